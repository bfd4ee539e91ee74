"""The Megatron engine on a CUDA device: megatron-core as it comes, NCCL, bf16."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_process import curve, prepare_markov, state, train, write_run

from mpotrain.engine.megatron import cpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLAIN = ["model.dropout=0.0", "model.attention_dropout=0.0", "train.schedule.lr=1e-3"]
MIXTURE = (
    "model.moe={num_experts=4, every=2, router={top_k=2}, "
    "c_fc={kind='mpo', in_modes=[4,4,2], out_modes=[4,8,4], cap=6}, "
    "c_proj={kind='asymmetric', in_mode=16, out_mode=8}}"
)


@pytest.fixture
def new(tmp_path: Path) -> Callable[[str], Path]:
    """Write a run file with a run folder of its own."""
    data = prepare_markov(tmp_path / "data")
    return lambda name: write_run(tmp_path / name, data)


def on_cuda(**options: str) -> str:
    more = "".join(f", {key}={value}" for key, value in options.items())
    return f"engine={{kind='megatron', device='cuda'{more}}}"


def test_nothing_is_replaced_where_there_is_a_device() -> None:
    before = torch.cuda.current_device
    assert cpu.install() is False
    assert torch.cuda.current_device is before


@pytest.mark.parametrize("mixture", [[], [MIXTURE]], ids=["ttm", "moe"])
@pytest.mark.parametrize("overlap", ["false", "true"])
def test_fp32_curve_is_that_of_the_local_engine(
    new: Callable[[str], Path], mixture: list[str], overlap: str
) -> None:
    alone, cut = new("alone"), new("cut")
    train(alone, "engine.device=cpu", *PLAIN, *mixture)
    options = on_cuda(overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    train(cut, options, *PLAIN, *mixture, launcher="torchrun", world=1)
    losses = [[loss for _, loss, *_ in curve(run.parent / "run")] for run in (alone, cut)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_bf16_repeats_its_bits_and_follows_the_local_engine(new: Callable[[str], Path]) -> None:
    runs = [new("one"), new("two"), new("local")]
    for run in runs[:2]:
        train(run, on_cuda(dtype="'bf16'"), *PLAIN, launcher="torchrun", world=1)
    train(runs[2], "engine={kind='local', device='cuda', dtype='bf16'}", *PLAIN)
    one, two, local = (curve(run.parent / "run") for run in runs)
    assert one == two
    first, second = (state(run.parent / "run", 20) for run in runs[:2])
    assert all(torch.equal(first[name]["weight"], second[name]["weight"]) for name in first)
    for (_, loss, *_), (_, expected, *_) in zip(one, local, strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("parallel", ["{tensor=2, sequence=true}", "{pipeline=2}", "{context=2}"])
def test_layouts_over_nccl(new: Callable[[str], Path], parallel: str) -> None:
    alone, cut = new("alone"), new("cut")
    train(alone, "engine.device=cpu", *PLAIN)
    train(cut, on_cuda(), f"parallel={parallel}", *PLAIN, launcher="torchrun", world=2)
    losses = [[loss for _, loss, *_ in curve(run.parent / "run")] for run in (alone, cut)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
