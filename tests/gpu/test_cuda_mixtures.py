"""Mixtures of experts on a CUDA device: the CPU's numbers, the same bits twice, bf16 kernels."""

from pathlib import Path

import pytest
import torch
from run_process import curve, prepare_markov, state, train, write_run

from mpotrain.nn.moe.config import AsymmetricExpertSite, ExpertPlanChoice, MPOExpertSite
from mpotrain.nn.moe.experts import DenseExperts, MPOExperts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COUNTS = [10, 0, 40, 14]
MIXTURE = (
    "model.moe={num_experts=4, every=2, router={top_k=2, balance_rate=1e-3}, "
    "c_fc={kind='mpo', start='independent', in_modes=[4,4,2], out_modes=[4,8,4], cap=6}, "
    "c_proj={kind='asymmetric', start='independent', in_mode=16, out_mode=8}}"
)


def experts_of_kind(kind: str, plan: ExpertPlanChoice) -> MPOExperts | DenseExperts:
    generator = torch.Generator().manual_seed(3)
    if kind == "dense":
        return DenseExperts(192, 384, 4, bias=True, std=0.05, generator=generator)
    site: MPOExpertSite | AsymmetricExpertSite
    if kind == "mpo":
        site = MPOExpertSite(
            start="independent",
            in_modes=(2, 4, 6, 2, 2),
            out_modes=(2, 4, 6, 4, 2),
            cap=16,
            plan=plan,
        )
    else:
        site = AsymmetricExpertSite(
            start="independent", in_mode=16, out_mode=32, in_bond=8, plan=plan
        )
    return MPOExperts(site.spec(192, 384), site, 4, bias=True, std=0.05, generator=generator)


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("dense", "auto"),
        *((kind, plan) for kind in ("mpo", "asymmetric") for plan in ("grouped", "factored")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_give_on_cuda_what_they_give_on_the_cpu(
    kind: str, plan: ExpertPlanChoice, dtype: torch.dtype
) -> None:
    layer = experts_of_kind(kind, plan)
    layer = layer.double() if dtype is torch.float64 else layer
    x = torch.randn(sum(COUNTS), 192).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        layer = layer.to(device)
        layer.zero_grad()
        rows = x.to(device).requires_grad_()
        y = layer(rows, COUNTS, len(rows))
        y.float().square().sum().backward()
        assert rows.grad is not None
        grads = {name: p.grad.cpu() for name, p in layer.named_parameters() if p.grad is not None}
        results.append((y.detach().cpu(), rows.grad.cpu(), grads))
    (y, dx, grads), (cuda_y, cuda_dx, cuda_grads) = results
    tolerance = 1e-10 if dtype is torch.float64 else 3e-2
    pairs = [(y, cuda_y), (dx, cuda_dx), *((grads[n], cuda_grads[n]) for n in grads)]
    for expected, found in pairs:
        scale = float(expected.double().abs().max())
        assert float((found.double() - expected.double()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_runs_on_cuda_have_the_same_bits(dtype: str, tmp_path: Path) -> None:
    data = prepare_markov(tmp_path / "data")
    for name in ("one", "two"):
        run = write_run(tmp_path / name, data)
        train(run, MIXTURE, f"engine.dtype={dtype}", "engine.device=cuda")
    assert curve(tmp_path / "one" / "run") == curve(tmp_path / "two" / "run")
    first, second = (state(tmp_path / name / "run", 20) for name in ("one", "two"))
    assert all(torch.equal(first[n]["weight"], second[n]["weight"]) for n in first)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_on_cuda_in_bf16(stage: int, tmp_path: Path) -> None:
    data = prepare_markov(tmp_path / "data")
    run = write_run(tmp_path, data)
    world = min(2, torch.cuda.device_count())
    train(run, MIXTURE, f"parallel.expert={world}",
          f"engine={{kind='deepspeed', zero_stage={stage}, dtype='bf16', device='cuda'}}",
          launcher="torchrun", world=world)  # fmt: skip
    assert curve(tmp_path / "run")[-1][1] < curve(tmp_path / "run")[0][1]
