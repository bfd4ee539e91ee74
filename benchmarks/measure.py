"""How the benchmarks measure: interleaved rounds, ratios within a round, memory, environment.

Absolute times of a shared machine drift; the ratio of two runs in the same round hardly does. All
candidates therefore run once in every round, and what is reported is the median over the rounds of
the ratio to the baseline of the same round, with the first and third quartile.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Times of one candidate.

    Attributes:
        seconds: median time of a run.
        ratio: median over the rounds of its time over that of the baseline.
        low: first quartile of the ratios.
        high: third quartile of the ratios.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def interleaved(
    runs: Mapping[str, Run], baseline: str, rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Time every candidate once per round, after one round of warm-up.

    A candidate whose warm-up took five times as long as the baseline's runs in two rounds only.

    Args:
        runs: candidates by name.
        baseline: name of the candidate that ratios refer to.
        rounds: number of rounds, at least 2.
        device: what to wait for before the clock is read.
    """
    warm = {name: _seconds(run, device) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            if turn < 2 or warm[name] <= 5.0 * warm[baseline]:
                seconds[name].append(_seconds(run, device))
    timings = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[baseline], strict=False)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        timings[name] = Timing(statistics.median(values), middle, low, high)
    return timings


def peak_bytes(run: Run, device: torch.device) -> int:
    """Return the most memory that a run holds beyond what was held before it.

    Args:
        run: the candidate.
        device: whose allocator is watched.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _quiet_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    events: Any = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Return the bytes that forward keeps for backward.

    Args:
        forward: builds the graph.
        known: tensors that exist anyway (the input, the parameters); they do not count.
    """
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def environment(device: torch.device) -> dict[str, Any]:
    """Return hardware, versions and the state of the sources, for the head of a result file."""
    packages = ("mpotrain", "torch", "tensorly", "tensorly-torch", "opt-einsum", "numpy")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in packages},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _seconds(run: Run, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence the trace points that the profiler writes to the process's standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
