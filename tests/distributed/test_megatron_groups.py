"""Groups of ranks are made for an engine and end with it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed.megatron_cases import Layout, megatron_engine, network, run_steps
from distributed.megatron_grid import megatron_grid

from mpotrain.errors import ParallelError
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

TENSOR = ParallelConfig(tensor=2, sequence=True)
MORE = 2
"""Threads that may come for other reasons; a group that stays has three."""
Run = Callable[[int], Callable[..., list[Any]]]


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def settled_threads(before: list[int]) -> int:
    """Count the threads that stay; those of gloo end a little after their group."""
    if not before:
        time.sleep(0.2)
        return num_threads()
    deadline = time.monotonic() + 30
    while num_threads() > before[0] + MORE and time.monotonic() < deadline:
        time.sleep(0.02)
    return num_threads()


def threads_after_each(world: World) -> list[int]:
    found: list[int] = []
    for _ in range(4):
        with megatron_grid(world, TENSOR):
            world.barrier()
        found.append(settled_threads(found))
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc (Linux)")
def test_closed_groups_leave_no_threads(run_ranks: Run) -> None:
    for counts in run_ranks(2)(threads_after_each):
        assert max(counts[1:]) <= counts[0] + MORE


def threads_after_mixtures(world: World) -> list[int]:
    found: list[int] = []
    for _ in range(3):
        engine = megatron_engine(world, network("gpt-moe"), Layout(ParallelConfig(expert=2)))
        run_steps(engine, network("gpt-moe"), [0])
        engine.close()
        del engine
        for _ in range(3):
            gc.collect()
        found.append(settled_threads(found))
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc (Linux)")
def test_mixtures_keep_no_graph_that_holds_the_engine(run_ranks: Run) -> None:
    for counts in run_ranks(2)(threads_after_mixtures):
        assert max(counts[1:]) <= counts[0] + MORE


def two_engines(world: World) -> str:
    first = megatron_engine(world, network("gpt-ttm"), Layout(TENSOR))
    second = megatron_engine(world, network("gpt-ttm"), Layout(TENSOR))
    first.close()
    try:
        with pytest.raises(ParallelError) as caught:
            megatron_engine(world, network("gpt-ttm"), Layout(replace(TENSOR, sequence=False)))
    finally:
        second.close()
    third = megatron_engine(world, network("gpt-ttm"), Layout(ParallelConfig(pipeline=2)))
    third.close()
    return str(caught.value)


def test_engines_of_a_process_share_groups_of_equal_degrees(run_ranks: Run) -> None:
    for text in run_ranks(2)(two_engines):
        assert "close it before" in text
