"""A pool of gloo workers that lives as long as the test session.

Importing torch and DeepSpeed costs seconds for each process, so the workers stay; every test gets
a fresh process group over a file store of its own.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

MAX_WORLD = 4
MAX_THREADS = 150
TIMEOUT = 300.0
"""Seconds for a call unless it says otherwise; ranks may start and import everything meanwhile."""
COLLECTIVE_TIMEOUT = timedelta(seconds=0.8 * TIMEOUT)
LAST_WORDS = 5.0
"""Seconds of silence after a first failure, in which the other ranks may tell theirs."""
_modules_seen = [0]
"""Numbers of modules in a worker when it last set objects aside from garbage collection."""


class RankError(AssertionError):
    """A worker raised; the message holds its rank and its traceback."""


@dataclass(frozen=True)
class Job:
    call: bytes
    world: int
    store: str
    path: list[str]


class RankPool:
    """Up to `MAX_WORLD` spawned workers, started when they are first needed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[Any] = []
        self._jobs: list[Any] = []
        self._results: Any = None

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
    ) -> list[Any]:
        """Call `function(world, *args)` on every rank, with the rank's `World` in front.

        Returns:
            The results in rank order.

        Raises:
            RankError: a rank raised; all workers are replaced.
            TimeoutError: some ranks did not answer; all workers are replaced.
        """
        if any(_num_threads(worker.pid) > MAX_THREADS for worker in self._workers):
            self.close()  # groups that nobody frees have threads that poll
        self._start(world)
        with tempfile.TemporaryDirectory(prefix="mpotrain-ranks-") as folder:
            # Pickled apart: a worker must know the path before it can import the function.
            call = pickle.dumps((function, args))
            job = Job(call, world, str(Path(folder) / "store"), list(sys.path))
            for inbox in self._jobs[:world]:
                inbox.put(job)
            try:
                return self._collect(world, timeout)
            except BaseException:
                # Peers of a failed rank hang in a collective.
                self.kill()
                raise

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        self._workers, self._jobs, self._results = [], [], None

    def close(self) -> None:
        for inbox in self._jobs:
            inbox.put(None)
        deadline = time.monotonic() + 10
        for worker in self._workers:
            worker.join(max(0.1, deadline - time.monotonic()))
        self.kill()

    def _start(self, world: int) -> None:
        assert 1 <= world <= MAX_WORLD
        if self._results is None:
            self._results = self._context.Queue()
        while len(self._workers) < world:
            inbox = self._context.Queue()
            rank = len(self._workers)
            worker = self._context.Process(
                target=_serve, args=(rank, inbox, self._results, os.getpid()), daemon=True
            )
            worker.start()
            self._jobs.append(inbox)
            self._workers.append(worker)

    def _collect(self, world: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        heard = time.monotonic()
        dead: list[int] = []
        while len(results) < world:
            wait = deadline - time.monotonic()
            try:
                rank, ok, value = self._results.get(timeout=max(0.1, min(wait, 1.0)))
            except queue.Empty:
                dead = [n for n, w in enumerate(self._workers[:world]) if not w.is_alive()]
                # What another rank has to tell may be the cause of a first failure.
                if dead or (failures and time.monotonic() - heard > LAST_WORDS):
                    break
                if not failures and time.monotonic() > deadline:
                    missing = sorted(set(range(world)) - set(results))
                    raise TimeoutError(f"ranks {missing} did not answer in {timeout:g} s") from None
                continue
            heard = time.monotonic()
            if ok:
                results[rank] = pickle.loads(value)
            else:
                failures[rank] = value
            if len(results) + len(failures) == world:
                break
        said = [f"rank {rank}:\n{failures[rank]}" for rank in sorted(failures)]
        if dead:
            # A peer that waits for a dead rank has not failed: it is not counted among the dead.
            said.insert(0, f"ranks {dead} died")
        if said:
            raise RankError("\n".join(said))
        return [results[rank] for rank in range(world)]


def _num_threads(pid: int) -> int:
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def _serve(rank: int, inbox: Any, results: Any, parent: int) -> None:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = inbox.get(timeout=5)
        except queue.Empty:
            if os.getppid() != parent:
                return
            continue
        if job is None:
            return
        try:
            value = pickle.dumps(_run(rank, job))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
        else:
            results.put((rank, True, value))


def _run(rank: int, job: Job) -> Any:
    sys.path[:] = job.path
    importlib.invalidate_caches()
    import torch
    import torch.distributed as dist

    from mpotrain.parallel.ranks import Ranks, World, export_environment

    place = Ranks(rank, job.world, rank, job.world, 0, "127.0.0.1", 1, "launcher")
    export_environment(place, os.environ, rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.store}",
        rank=rank,
        world_size=job.world,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        world = World(rank, job.world, rank, torch.device("cpu"), "gloo")
        function, args = pickle.loads(job.call)
        value = function(world, *args)
        dist.barrier()
    finally:
        _leave()
    return value


def _leave() -> None:
    """Take down the process group and what DeepSpeed keeps in global variables."""
    import torch.distributed as dist

    if "deepspeed" in sys.modules:
        _reset_deepspeed()
    _free_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_groups() -> None:
    """Free the groups of engines that are gone.

    A group of gloo has three threads, of which one looks around a hundred times in a second until
    nothing refers to the group any more; engines are cycles of references, and thousands of such
    threads slow everything down.
    """
    for _ in range(4):  # what is freed may set more free
        if gc.collect() == 0:
            break
    if _modules_seen[-1] != len(sys.modules):
        _modules_seen.append(len(sys.modules))
        gc.freeze()  # what came with new modules need not be looked through every time


def _reset_deepspeed() -> None:
    import deepspeed.comm.comm as comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    comm.cdb = None
    # Stage 3 numbers modules and parameters over the whole life of a process: ranks that have run
    # fewer tests would disagree about the numbers.
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()
    Init.param_id = 0
    groups._release_process_group_references(None)
