"""One all-reduce in a group of its own: is the sum right, and how fast is it?

The groups are made apart from `torch.distributed`'s default one, so that ranks can meet in pairs
while others are dead, and a group that hangs can be left behind.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Backend, Store

CPU_BYTES = 16 * 2**20
CUDA_BYTES = 128 * 2**20
ROUNDS = 3

_kept: list[Any] = []
"""Groups are never torn down: that can hang where a partner is gone."""


def all_reduce_speed(
    store: Store,
    index: int,
    size: int,
    device: torch.device,
    seconds: float,
    num_bytes: int | None = None,
) -> float:
    """Sum known numbers over the ranks of a group, check the sum, take the time.

    Args:
        store: keys of this group alone.
        index: number of this rank in the group.
        size: ranks in the group, at least 2.
        device: where the numbers lie; decides between gloo and NCCL.
        seconds: how long the group waits for a partner.
        num_bytes: bytes of each rank; default: 16 MiB on a CPU, 128 MiB on a GPU.

    Returns:
        Bus bandwidth in GiB/s, the best of three: bytes / seconds x 2 (n - 1) / n, which for a
        ring of n ranks is what goes through each rank's link, whatever n.

    Raises:
        RuntimeError: the group did not come together, an all-reduce failed, or the sum is wrong.
    """
    group: Any = _group(store, index, size, device, seconds)
    _kept.append(group)
    if num_bytes is None:
        num_bytes = CUDA_BYTES if device.type == "cuda" else CPU_BYTES
    base = torch.arange(num_bytes // 4, dtype=torch.int32, device=device) % 1021
    exact = base * size + size * (size - 1) // 2
    best, num_wrong = float("inf"), 0
    for _ in range(1 + ROUNDS):  # the first one connects
        values = base + index
        _synchronize(device)
        start = time.monotonic()
        group.allreduce([values], dist.AllreduceOptions()).wait(timedelta(seconds=seconds))
        _synchronize(device)
        best = min(best, time.monotonic() - start)
        # Going on to the end even so: the partners must not be left waiting.
        num_wrong = max(num_wrong, int((values != exact).sum()))
    if num_wrong:
        raise RuntimeError(f"{num_wrong} of {exact.numel()} sums are wrong")
    return num_bytes / 2**30 / best * 2 * (size - 1) / size


def _group(store: Store, index: int, size: int, device: torch.device, seconds: float) -> Backend:
    limit = timedelta(seconds=seconds)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, index, size, limit)
    # Errors must come back as exceptions: torch's watchdog would end the whole process instead.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, index, size, options)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
