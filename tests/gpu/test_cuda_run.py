"""What only a CUDA device can show: the same layers and runs there, twice with the same bits."""

from pathlib import Path

import pytest
import torch
from run_process import curve, prepare_markov, state, train, write_run

from mpotrain.nn.config import MPOSite
from mpotrain.nn.linear import TensorizedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("plan", ["materialise", "chain", "groups"])
def test_a_layer_gives_on_cuda_what_it_gives_on_the_cpu(plan: str) -> None:
    site = MPOSite(in_modes=(4, 8, 6), out_modes=(8, 6, 8), cap=16, plan=plan)  # type: ignore[arg-type]
    layer = TensorizedLinear(site.spec(192, 384), site, bias=True, std=0.05).double()
    x = torch.randn(64, 192, dtype=torch.float64, requires_grad=True)
    expected = layer(x)
    expected.square().sum().backward()
    gradients = [core.grad for core in layer.cores]
    layer.zero_grad()
    other = layer.cuda()
    y = other(x.detach().cuda())
    y.square().sum().backward()
    torch.testing.assert_close(y.cpu(), expected.detach())
    for core, gradient in zip(other.cores, gradients, strict=True):
        torch.testing.assert_close(core.grad.cpu(), gradient)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_runs_on_cuda_have_the_same_bits_and_follow_the_cpu(dtype: str, tmp_path: Path) -> None:
    data = prepare_markov(tmp_path / "data")
    curves = []
    for name, device in (("one", "cuda"), ("two", "cuda"), ("cpu", "cpu")):
        run = write_run(tmp_path / name, data)
        train(run, f"engine.dtype={dtype}", f"engine.device={device}", "model.dropout=0.0",
              "model.attention_dropout=0.0")  # fmt: skip
        curves.append(curve(tmp_path / name / "run"))
    assert curves[0] == curves[1]
    first, second = (state(tmp_path / name / "run", 20) for name in ("one", "two"))
    assert all(torch.equal(first[n]["weight"], second[n]["weight"]) for n in first)
    tolerance = 1e-4 if dtype == "fp32" else 3e-2
    for on_cuda, on_cpu in zip(curves[0], curves[2], strict=True):
        assert on_cuda[1] == pytest.approx(on_cpu[1], rel=tolerance)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_on_cuda_in_bf16(stage: int, tmp_path: Path) -> None:
    data = prepare_markov(tmp_path / "data")
    run = write_run(tmp_path, data)
    train(run, f"engine={{kind='deepspeed', zero_stage={stage}, dtype='bf16', device='cuda'}}",
          launcher="torchrun", world=1)  # fmt: skip
    assert curve(tmp_path / "run")[-1][1] < curve(tmp_path / "run")[0][1]
