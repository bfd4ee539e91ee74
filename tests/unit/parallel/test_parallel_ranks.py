from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mpotrain.errors import ParallelError
from mpotrain.parallel.ranks import (
    Ranks,
    World,
    close_world,
    init_world,
    microbatch_seed,
    resolve_device,
    watch_parent,
)


def test_world_of_one_needs_no_process_group() -> None:
    world = init_world("local", "cpu", ranks=Ranks(0, 1, 0, 1, 0, None, None, "single"))
    assert world == World(0, 1, 0, torch.device("cpu"))
    assert not dist.is_initialized()
    assert world.is_main
    assert world.agree(7) == 7
    assert world.all_reduce_sum(torch.tensor([2.0])).tolist() == [2.0]
    assert world.reduce_sum(torch.tensor([2.0]), 0).tolist() == [2.0]
    assert world.broadcast(torch.tensor([3])).tolist() == [3]
    assert world.broadcast_object("x") == "x"
    assert world.gather_objects("x") == ["x"]
    world.barrier()
    close_world(world)


def test_deepspeed_world_of_one_opens_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    world = init_world("deepspeed", "cpu", ranks=Ranks(0, 1, 0, 1, 0, None, None, "single"))
    try:
        assert (world.backend, dist.get_world_size()) == ("gloo", 1)
        assert os.environ["MASTER_PORT"] == "0"
    finally:
        close_world(world)
    assert not dist.is_initialized()


def test_local_engine_refuses_several_processes() -> None:
    with pytest.raises(ParallelError, match="the local engine runs one process, but 4"):
        init_world("local", "cpu", ranks=Ranks(0, 4, 0, 4, 0, "127.0.0.1", 1, "launcher"))


def test_absent_peer_is_an_error_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    # Port 1 cannot be bound or reached: rank 1 waits for a rank 0 that never comes.
    lonely = Ranks(1, 2, 1, 2, 0, "127.0.0.1", 1, "launcher")
    with pytest.raises(ParallelError, match=r"rank 1 of 2 could not meet .*127\.0\.0\.1:1"):
        init_world("deepspeed", "cpu", ranks=lonely, timeout=timedelta(seconds=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_is_refused() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ParallelError, match=r"engine\.device"):
        resolve_device("cuda")


@pytest.mark.parametrize(("count", "local_rank", "index"), [(4, 2, 2), (1, 3, 0)])
def test_cuda_index(
    monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int, index: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert resolve_device("auto", local_rank) == torch.device("cuda", index)


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ParallelError, match="local rank 2 finds only 2 CUDA devices"):
        resolve_device("cuda", 2)


def test_seed_depends_on_every_counter_and_fits_torch() -> None:
    seeds = {
        microbatch_seed(seed, step, m)
        for seed in (0, 1, 2**40, -1)
        for step in range(50)
        for m in range(50)
    }
    assert len(seeds) == 4 * 50 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))


def test_seed_is_splitmix64() -> None:
    # First outputs of the reference generator started at 0 and at the golden ratio.
    from mpotrain.parallel.seeds import _GOLDEN, _mix

    assert _mix(0) == 0xE220A8397B1DCDAF
    assert _mix(_GOLDEN) == 0x6E789E6AA1B965F4


def test_seed_never_changes() -> None:
    # Resumed runs depend on these values.
    assert microbatch_seed(1, 2, 3) == SEED_1_2_3
    assert microbatch_seed(1, 3, 2) != microbatch_seed(1, 2, 3)


SEED_1_2_3 = 6_201_754_918_196_647_608


WORKER = """
import os, sys, time
from mpotrain.parallel.watch import watch_parent
marker = sys.argv[1]
def orphan():
    print("orphaned", file=open(marker + ".draft", "w"), flush=True)
    os.rename(marker + ".draft", marker)
watch = watch_parent(orphan, interval=0.05)
print("ready", flush=True)
time.sleep(300)
"""


def test_worker_notices_that_its_launcher_died(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    launcher = textwrap.dedent(
        """
        import subprocess, sys, time
        worker = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]],
                                  stdout=subprocess.PIPE)
        worker.stdout.readline()
        print(worker.pid, flush=True)
        time.sleep(300)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, WORKER, str(marker)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        time.sleep(0.3)
        assert not marker.exists()
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert marker.read_text() == "orphaned\n"
    finally:
        os.kill(worker, signal.SIGKILL)


def test_watch_stops(tmp_path: Path) -> None:
    calls: list[int] = []
    with watch_parent(lambda: calls.append(1), interval=0.01) as watch:
        time.sleep(0.05)
    assert calls == []
    assert watch.parent == os.getppid()
