"""The harness itself: results, failures, deaths and time-outs of workers."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from distributed.pool import RankError, RankPool

from mpotrain.parallel.ranks import World


def talk(world: World, factor: int) -> dict[str, Any]:
    total = world.all_reduce_sum(torch.tensor([float(world.rank + 1)]))
    onto = world.reduce_sum(torch.tensor([world.rank + 1]), 1)
    return {
        "pid": os.getpid(),
        "rank": world.rank,
        "sum": float(total) * factor,
        "onto_rank_1": int(onto) if world.rank == 1 else None,
        "agreed": world.agree(85 if world.rank == 1 else 0),
        "told": world.broadcast_object({"from": world.rank}, source=1),
        "all": world.gather_objects(f"rank {world.rank}"),
        "copied": world.broadcast(torch.tensor([world.rank]), source=1).tolist(),
        "main": world.is_main,
    }


def fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise ValueError("boom")
    world.barrier()


def die_on_rank_1(world: World, told: bool) -> None:
    if world.rank == 1:
        os._exit(3)
    if told:
        world.barrier()
    time.sleep(60)


def sleep(world: World, seconds: float) -> None:
    time.sleep(seconds)


def test_ranks_talk_and_workers_stay(run_ranks: Any, rank_pool: RankPool) -> None:
    first = run_ranks(2)(talk, 10)
    for rank, said in enumerate(first):
        assert said["rank"] == rank
        assert said["sum"] == 30.0
        assert said["agreed"] == 85
        assert said["told"] == {"from": 1}
        assert said["all"] == ["rank 0", "rank 1"]
        assert said["copied"] == [1]
        assert said["main"] == (rank == 0)
    assert first[1]["onto_rank_1"] == 3
    again = run_ranks(2)(talk, 1)
    assert [said["pid"] for said in again] == [said["pid"] for said in first]
    assert [said["pid"] for said in first] == rank_pool.pids[:2]


def test_failure_carries_rank_and_traceback_and_pool_recovers(run_ranks: Any) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2)(fail_on_rank_1)
    text = str(caught.value)
    assert "rank 1:" in text
    assert "ValueError: boom" in text
    assert "in fail_on_rank_1" in text
    assert run_ranks(2)(talk, 1)[0]["sum"] == 3.0


@pytest.mark.parametrize("told", [True, False], ids=["peer fails", "peer waits"])
def test_dead_worker_is_reported(told: bool) -> None:
    pool = RankPool()
    try:
        # The peer learns of the death, or is busy and says nothing until all is over: the dead
        # rank is named either way, and it alone.
        with pytest.raises(RankError, match=r"^ranks \[1\] died(\nrank 0:|$)"):
            pool.run(2, die_on_rank_1, told)
        assert pool.pids == []
    finally:
        pool.close()


def test_hang_ends_in_time() -> None:
    pool = RankPool()
    try:
        pool.run(1, sleep, 0.0)  # from here on it answers at once, unless it hangs
        with pytest.raises(TimeoutError, match=r"ranks \[0\] did not answer in 1 s"):
            pool.run(1, sleep, 60.0, timeout=1.0)
    finally:
        pool.close()
