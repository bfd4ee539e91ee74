"""Every network in every layout of the Megatron engine equals the local engine, or is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from distributed.megatron_cases import (
    NETWORKS,
    Layout,
    local_engine,
    megatron_engine,
    network,
    run_steps,
)
from distributed.megatron_matrix import LAYOUTS, reason_of, refusals

from mpotrain.parallel.ranks import World

STEPS = range(5)
TOLERANCE = 1e-5
PAGE = Path(__file__).parents[2] / "docs" / "megatron.md"
Run = Callable[[int], Callable[..., list[Any]]]


def steps_of(world: World, name: str, layout: Layout) -> list[tuple[float, ...]]:
    model = network(name, recompute=layout.recompute)
    engine = megatron_engine(world, model, layout)
    try:
        return run_steps(engine, model, STEPS)
    finally:
        engine.close()


@cache
def expected(name: str) -> list[tuple[float, ...]]:
    """Loss and gradient norm of each step on the local engine."""
    return run_steps(local_engine(network(name)), network(name), STEPS)


CELLS = [(name, layout) for name in NETWORKS for layout in LAYOUTS]


@pytest.mark.parametrize(("name", "layout"), [c for c in CELLS if reason_of(*c) is None])
def test_five_steps_equal_the_local_engine(run_ranks: Run, name: str, layout: str) -> None:
    assert refusals(name, LAYOUTS[layout]) == []
    for steps in run_ranks(LAYOUTS[layout].ranks)(steps_of, name, LAYOUTS[layout]):
        for found, wanted in zip(steps, expected(name), strict=True):
            assert found == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "layout"), [c for c in CELLS if reason_of(*c) is not None])
def test_the_rest_is_refused_with_the_reason(name: str, layout: str) -> None:
    reason = reason_of(name, layout)
    assert reason is not None
    assert reason in "\n".join(refusals(name, LAYOUTS[layout]))


def test_the_page_shows_every_cell() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|(.+)\|$", PAGE.read_text(), re.MULTILINE)
    table = {layout: [cell.strip() for cell in cells.split("|")] for layout, cells in rows}
    rows_of_options = {layout for layout, cells in table.items() if len(cells) != len(NETWORKS)}
    assert table.keys() - rows_of_options == LAYOUTS.keys()
    for layout in LAYOUTS:
        shown = ["equal" if reason_of(name, layout) is None else "refused" for name in NETWORKS]
        assert [cell.split(":")[0] for cell in table[layout]] == shown, layout
