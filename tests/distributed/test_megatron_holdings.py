"""What `plan` says a rank holds, against the parameters that the engine builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed.megatron_grid import megatron_grid

from mpotrain.config import load_config
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.problems import Layout, megatron_problems
from mpotrain.engine.megatron.stages import Stages, Work
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

RUNS = Path(__file__).resolve().parents[2] / "configs" / "runs"
ENGINE = MegatronConfig()
SMALL = {
    "demo": ["model.num_layers=4"],
    "demo-moe": [],
    "demo-encoder": ["model.num_layers=4", "model.sharing.groups=2", "model.adapter={rank=4}"],
    "demo-t5": ["data.sequence_length=122"],  # 28 targets
}
"""Runs that are quickly built, with changes to them."""

Held = tuple[str, int, bool, bool]
"""Logical name, elements, whether partial, whether of experts."""


def work(name: str, parallel: ParallelConfig, world_size: int) -> Work:
    run = load_config(RUNS / f"{name}.toml", SMALL[name])
    asked = Layout(run.model, parallel, run.data, 8, 2, world_size)
    assert megatron_problems(asked) == []
    return Work(
        model=run.model, engine=ENGINE, parallel=parallel, lengths=run.sample_lengths(),
        micro_batch_size=2, accumulation=2, world_size=world_size,
    )  # fmt: skip


def built(
    world: World, cases: list[tuple[str, ParallelConfig]]
) -> list[tuple[list[Held], set[str]]]:
    """Return what this rank holds of each case, and of which of it there are copies."""
    found = []
    for name, parallel in cases:
        with megatron_grid(world, parallel):
            from mpotrain.engine.megatron.chunks import build_chunks
            from mpotrain.engine.megatron.placement import placement_of

            model = work(name, parallel, world.size).model
            chunks = build_chunks(model, ENGINE, parallel, world.device)
            placements = [
                (placement_of(parameter), parameter.numel())
                for module in chunks.modules
                for parameter in module.parameters()
            ]
            held = [(p.name, size, p.is_partial, p.is_expert) for p, size in placements]
            found.append((sorted(held), {p.name for p, _ in placements if p.is_shared}))
    return found


CASES = {
    1: [(name, ParallelConfig()) for name in SMALL],
    2: [
        ("demo", ParallelConfig(tensor=2)),
        ("demo", ParallelConfig(tensor=2, sequence=True)),
        ("demo", ParallelConfig(pipeline=2, virtual_pipeline=2)),
        ("demo", ParallelConfig(context=2)),
        ("demo-encoder", ParallelConfig(tensor=2)),
        ("demo-encoder", ParallelConfig(tensor=2, sequence=True)),
        ("demo-encoder", ParallelConfig(pipeline=2, virtual_pipeline=2)),
        ("demo-t5", ParallelConfig(tensor=2, sequence=True)),
        ("demo-t5", ParallelConfig(tensor=2, sequence=True, expert_tensor=2)),
        ("demo-moe", ParallelConfig(expert=2)),
        ("demo-moe", ParallelConfig(tensor=2, sequence=True)),
        ("demo-moe", ParallelConfig(tensor=2, sequence=True, expert=2)),
        ("demo-moe", ParallelConfig(tensor=2, sequence=True, expert_tensor=2)),
    ],
    4: [
        ("demo", ParallelConfig(tensor=2, pipeline=2, sequence=True)),
        ("demo-moe", ParallelConfig(tensor=2, pipeline=2, sequence=True, expert=2)),
        ("demo-moe", ParallelConfig(tensor=2, sequence=True, expert=2, expert_tensor=2)),
        ("demo-encoder", ParallelConfig(pipeline=4)),
        ("demo-encoder", ParallelConfig(tensor=2, pipeline=2)),
        ("demo-t5", ParallelConfig(tensor=2, sequence=True, expert=2)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_hold_what_is_foretold(
    size: int, run_ranks: Callable[[int], Callable[..., list[Any]]]
) -> None:
    by_rank = run_ranks(size)(built, CASES[size])
    for number, (name, parallel) in enumerate(CASES[size]):
        stages = Stages(work(name, parallel, size))
        for rank, told in enumerate(by_rank):
            held, copies = told[number]
            stage = stages.stages[stages.work.grid.coordinates(rank)["pipeline"]]
            foretold = [(h.name, h.size, h.is_partial, h.is_expert) for h in stage.holdings]
            assert sorted(foretold) == held, (name, parallel, rank)
            assert stage.copied == copies, (name, parallel, rank)
