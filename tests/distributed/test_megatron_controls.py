"""Faults that must not go unnoticed: each makes the steps differ from the local engine's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest import mock

import pytest
from distributed.megatron_cases import (
    PLAIN,
    Layout,
    local_engine,
    megatron_engine,
    network,
    run_steps,
)

from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

SEEN = 1e-3
"""A relative difference far above the 1e-5 that all layouts keep."""


def steps_with(world: World, name: str, layout: Layout, fault: str) -> list[tuple[float, ...]]:
    model = network(name)
    with (
        mock.patch.object(*expert_central())
        if fault == "central as expert"
        else mock.patch.dict({})
    ):
        engine: Any = megatron_engine(world, model, layout)
    reductions = engine._ddp[0].config.finalize_model_grads_func
    if fault == "partial":
        assert reductions._partial
        reductions._partial = []
    elif fault == "stages":
        central = [n for n in reductions._shapes if n.startswith("bank.")]
        assert central
        for shared in central:
            del reductions._shapes[shared]
    elif fault == "chunks":
        reductions._copies = {n: copies[:1] for n, copies in reductions._copies.items()}
    try:
        return run_steps(engine, model, range(3))
    finally:
        engine.close()


def expert_central() -> tuple[Any, str, Any]:
    """Let central tensors of experts be reduced over the ranks that hold the same experts."""
    from mpotrain.engine.megatron.slots import Slots

    stock = Slots.add

    @wraps(stock)
    def add(self: Slots, owner: Any, attribute: str, name: str, *cuts: Any, **marks: Any) -> None:
        if name.endswith(".central"):
            marks["is_expert"] = True
        stock(self, owner, attribute, name, *cuts, **marks)

    return Slots, "add", add


FAULTS = {
    "partial": ("gpt-ttm", Layout(ParallelConfig(tensor=2), PLAIN)),
    "stages": ("mpobert", Layout(ParallelConfig(pipeline=2), PLAIN)),
    "chunks": ("mpobert", Layout(ParallelConfig(pipeline=2, virtual_pipeline=2), PLAIN)),
    "central as expert": ("gpt-moe", Layout(ParallelConfig(expert=2), PLAIN)),
}


@pytest.mark.parametrize("fault", [*FAULTS, *(f"no fault: {fault}" for fault in FAULTS)])
def test_a_missing_sum_is_seen(
    run_ranks: Callable[[int], Callable[..., list[Any]]], fault: str
) -> None:
    name, layout = FAULTS[fault.removeprefix("no fault: ")]
    wanted = run_steps(local_engine(network(name)), network(name), range(3))
    worst = max(
        abs(a - b) / abs(b)
        for steps in run_ranks(layout.ranks)(steps_with, name, layout, fault)
        for found, expected in zip(steps, wanted, strict=True)
        for a, b in zip(found, expected, strict=True)
    )
    if fault in FAULTS:
        assert worst > SEEN
    else:
        assert worst < 1e-5
