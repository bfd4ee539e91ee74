"""The processes of a run: who they are, and the few things they say to each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mpotrain.errors import LostRankError, MpotrainError, ParallelError
from mpotrain.parallel.environment import Ranks, export_environment, resolve_environment
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.seeds import microbatch_seed
from mpotrain.parallel.watch import watch_parent
from mpotrain.parallel.watchdog import collective_timeout

__all__ = [
    "Ranks",
    "World",
    "close_world",
    "export_environment",
    "init_world",
    "microbatch_seed",
    "resolve_device",
    "resolve_environment",
    "set_collective_timeout",
    "watch_parent",
]

T = TypeVar("T")

DATA_PARALLEL = ParallelConfig()
"""Every rank computes whole samples."""
COLLECTIVE_TIMEOUT = collective_timeout(None)
"""How long a rank waits for the others, without a watchdog, before it gives up with an error."""


@dataclass(frozen=True)
class World:
    """All ranks of a run, or of a group of them, seen from one of them.

    Every method but `is_main` is collective: all ranks call it, in the same order. A world of one
    needs no process group and answers at once.

    Attributes:
        rank: number of this process in the world.
        size: number of processes.
        local_rank: number of this process on its node.
        device: where this process computes.
        backend: "gloo" or "nccl"; None without a process group.
        parallel: degrees by which the ranks share the work on a micro-batch.
        group: the ranks, where they are not all of the run.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str | None = None
    parallel: ParallelConfig = DATA_PARALLEL
    group: dist.ProcessGroup | None = None

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks: those that meet different samples."""
        return self.parallel.data_ranks(self.size)

    @property
    def data_rank(self) -> int:
        """Which of the data-parallel parts this process works on, see `RankGrid`."""
        return self.rank // (self.parallel.tensor * self.parallel.context) % self.data_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes logs and manifests."""
        return self.rank == 0

    def agree(self, flag: int) -> int:
        """Return the largest `flag` of all ranks (a stop on one rank stops all)."""
        if self.size == 1:
            return flag
        value = torch.tensor(flag, dtype=torch.int64, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def reduce_sum(self, tensor: Tensor, target: int) -> Tensor:
        """Sum `tensor` over all ranks into that of rank `target`; others' contents are lost."""
        if self.size > 1:
            dist.reduce(tensor, group_dst=target, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite `tensor` with that of rank `source`, and return it."""
        if self.size > 1:
            dist.broadcast(tensor, group_src=source, group=self.group)
        return tensor

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Return the `value` of rank `source` (small picklable objects of our own ranks)."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(
            box, group_src=source, group=self.group, device=self._object_device
        )
        result: T = box[0]
        return result

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.group)
        return box

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; where one fails, all do.

        Without this, an error on one rank leaves the others waiting in their next collective.

        Returns:
            This rank's result.

        Raises:
            MpotrainError: this rank's own error.
            ParallelError: another rank failed; names it, with its text and its exit code.
        """
        error: MpotrainError | None = None
        try:
            result = action()
        except MpotrainError as raised:
            error = raised
        mine = None if error is None else (str(error), error.exit_code)
        everyone = self.gather_objects(mine)
        if error is not None:
            raise error
        for rank, failed in enumerate(everyone):
            if failed is not None:
                text, exit_code = failed
                theirs = ParallelError(f"rank {rank} failed: {text}")
                theirs.exit_code = exit_code
                raise theirs
        return result

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)

    @property
    def _object_device(self) -> torch.device:
        return self.device if self.backend == "nccl" else torch.device("cpu")


def init_world(
    engine: str,
    device: str = "auto",
    *,
    ranks: Ranks | None = None,
    parallel: ParallelConfig = DATA_PARALLEL,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> World:
    """Join the other processes of the run.

    Args:
        engine: kind of the engine; "local" stays a single process without a process group.
        device: "auto" (CUDA where there is any), "cpu" or "cuda".
        ranks: place of this process; by default read from the environment.
        parallel: degrees of the run.
        timeout: how long a collective waits for the other ranks.

    Returns:
        The world; leave it with `close_world`.

    Raises:
        ParallelError: the environment is inconsistent, or a device is missing.
        LostRankError: the ranks cannot meet.
    """
    ranks = resolve_environment(os.environ) if ranks is None else ranks
    chosen = resolve_device(device, ranks.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if engine == "local":
        if ranks.size > 1:
            raise ParallelError(
                f"engine.kind: the local engine runs one process, but {ranks.size} were started; "
                'start one, or set engine.kind="deepspeed"'
            )
        return World(0, 1, ranks.local_rank, chosen)
    export_environment(
        ranks, os.environ, ranks.local_rank if chosen.index is None else chosen.index
    )
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    # Control messages and checkpoints live in host memory, so gloo stands beside nccl.
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    try:
        _join(ranks, backends, timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise LostRankError(
            f"rank {ranks.rank} of {ranks.size} could not meet the others at "
            f"{ranks.master_addr}:{ranks.master_port} over {backend}: {error}; check that every "
            "rank was started, that the address can be reached and that the port is free"
        ) from error
    return World(ranks.rank, ranks.size, ranks.local_rank, chosen, backend, parallel)


def close_world(world: World) -> None:
    """Leave the process group; without this, gloo now and then aborts at exit."""
    if world.backend is not None and dist.is_initialized():
        dist.destroy_process_group()


def set_collective_timeout(world: World, timeout: timedelta) -> None:
    """Let all process groups of this process wait as long as the first one does.

    DeepSpeed and Megatron-core make groups with torch's own timeout, 10 or 30 minutes.
    """
    if world.backend is None:
        return
    # torch offers this under private names only; they have been there since 2.1.
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def resolve_device(device: str, local_rank: int = 0) -> torch.device:
    """Return the device of this process.

    Args:
        device: "auto", "cpu" or "cuda".
        local_rank: number of this process on its node.

    Raises:
        ParallelError: CUDA was asked for and is missing, or there are more ranks than devices.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ParallelError(
            'engine.device: "cuda" was asked for, but torch sees no CUDA device; '
            'set engine.device="cpu", or look at the driver and CUDA_VISIBLE_DEVICES'
        )
    # A scheduler that binds one device to each task shows it as device 0 to all of them.
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise ParallelError(
            f"engine.device: local rank {local_rank} finds only {count} CUDA devices; "
            f"start at most {count} processes on a node"
        )
    return torch.device("cuda", index)


def _join(ranks: Ranks, backends: str, timeout: timedelta) -> None:
    if ranks.size == 1:
        # A store inside the process: a world of one opens no port.
        dist.init_process_group(
            backends, store=_private_store(), rank=0, world_size=1, timeout=timeout
        )
    else:
        dist.init_process_group(backends, rank=ranks.rank, world_size=ranks.size, timeout=timeout)


def _private_store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]
