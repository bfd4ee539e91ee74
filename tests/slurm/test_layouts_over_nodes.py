"""Engines and layouts over two nodes follow the curve of one process, through a stop and a resume.

Tensor-parallel ranks share a node; data, pipeline and expert groups reach over both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_process import curve, train, write_run
from slurm.lab_fixture import SlurmLab
from slurm.scenario import LARGEST_DIFFERENCE, NO_CHECK, Scenario, full

STEPS = 40
COMMON = (
    f"train.steps={STEPS}",
    "train.eval_every=20",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "checkpoint.every=10",
    # Dropout differs between layouts, and a higher rate would blow rounding up (Adam).
    "model.dropout=0.0",
    "model.attention_dropout=0.0",
    "train.schedule.lr=1e-3",
)
MIXTURE = (
    "model.moe={num_experts=4, every=2, router={top_k=2, balance_rate=1e-3}, "
    "c_fc={kind='mpo', start='independent', in_modes=[4,4,2], out_modes=[4,8,4], cap=6}, "
    "c_proj={kind='asymmetric', start='independent', in_mode=16, out_mode=8}}",
)
MEGATRON = 'engine={kind="megatron", device="cpu"}'
ZERO = 'engine={kind="deepspeed", zero_stage=1, device="cpu"}'
TENSOR = "parallel={tensor=2, sequence=true}"
LAYOUTS: dict[str, tuple[str, ...]] = {
    "ZeRO-1 over nodes": (ZERO,),
    "ZeRO-1, experts over nodes": (ZERO, "parallel={expert=4}", *MIXTURE),
    "Megatron, tensor 2, data over nodes": (MEGATRON, TENSOR),
    "Megatron, tensor 2, pipeline over nodes": (
        MEGATRON, "parallel={tensor=2, sequence=true, pipeline=2}",
    ),
    "Megatron, tensor 2, experts over nodes": (
        MEGATRON, "parallel={tensor=2, sequence=true, expert=2}", *MIXTURE,
    ),
}  # fmt: skip
LAUNCHERS = {
    "ZeRO-1 over nodes": ("srun", "torchrun", "deepspeed"),
    "Megatron, tensor 2, data over nodes": ("srun", "torchrun", "deepspeed"),
}
"""Where a layout is not named: srun and torchrun."""
CASES = [
    (layout, launcher)
    for layout in LAYOUTS
    for launcher in LAUNCHERS.get(layout, ("srun", "torchrun"))
]
Losses = list[tuple[int, float, int]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[bool], Losses]:
    """The curve of one process of the engine `local`, without or with experts."""
    known: dict[bool, Losses] = {}

    def follow(experts: bool) -> Losses:
        if experts not in known:
            run = write_run(tmp_path_factory.mktemp("alone"), data)
            train(run, *COMMON, *(MIXTURE if experts else ()))
            points = curve(run.parent / "run")
            known[experts] = [(point[0], point[1], point[4]) for point in points]
        return known[experts]

    return follow


@full
@pytest.mark.parametrize(("layout", "launcher"), CASES)
def test_layouts_over_nodes(
    fresh_lab: SlurmLab,
    tmp_path: Path,
    data: Path,
    alone: Callable[[bool], Losses],
    layout: str,
    launcher: str,
) -> None:
    changes = (f'launcher = "{launcher}"', NO_CHECK)
    settings = [*COMMON, *LAYOUTS[layout]]
    scenario = Scenario(fresh_lab, tmp_path / "scenario", data, *changes, overrides=settings)
    job_id = scenario.submit()
    scenario.wait_for_step(STEPS // 2)
    fresh_lab.run(["scancel", "--signal=USR1", "--batch", job_id])
    scenario.wait_until_done()
    lives = scenario.events("started")
    assert len(lives) == 2
    assert {len(life["nodes"]) for life in lives} == {2}
    expected = alone(MIXTURE[0] in settings)
    found = scenario.curve()
    assert [(step, samples) for step, _, samples in found] == [(s, n) for s, _, n in expected]
    largest = max(abs(a - b) / abs(b) for (_, a, _), (_, b, _) in zip(found, expected, strict=True))
    print(f"| {layout} | {launcher} | largest difference of the loss {largest:.1e} |")
    assert largest <= LARGEST_DIFFERENCE
