"""Find, signal and await processes through /proc, told apart by their command line.

No pid is ever taken from a file: a file outlives its process, and the number may be another's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PROC = Path("/proc")


@dataclasses.dataclass(frozen=True)
class Process:
    """One process as /proc shows it.

    Attributes:
        pid: number on this machine, also for processes inside a node.
        parent: number of the parent.
        name: name of the program, cut to 15 characters by the kernel.
        argv: command line.
    """

    pid: int
    parent: int
    name: str
    argv: tuple[str, ...]


def read_process(pid: int) -> Process | None:
    """Return the process, or None where it is gone or only awaits its parent (zombie)."""
    try:
        line = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        raw = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    name = line[line.index("(") + 1 : line.rindex(")")]
    state, parent = line[line.rindex(")") + 1 :].split()[:2]
    if state in "ZX":
        return None
    argv = tuple(os.fsdecode(part) for part in raw.rstrip(b"\0").split(b"\0"))
    return Process(pid, int(parent), name, argv)


def find(wanted: Callable[[Process], bool]) -> list[Process]:
    """Return all processes that `wanted` accepts."""
    numbers = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]
    found = [read_process(pid) for pid in numbers]
    return [process for process in found if process is not None and wanted(process)]


def find_program(name: str, *arguments: str) -> list[Process]:
    """Return the processes of program `name` whose command line has all these whole arguments."""
    return find(lambda process: process.name == name and set(arguments) <= set(process.argv))


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal; while it starts it would die of it."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught >> (number - 1) & 1)


def environment(pid: int) -> dict[str, str]:
    """Return the environment the process was started with; empty where that may not be read."""
    try:
        raw = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (os.fsdecode(part).partition("=") for part in raw.split(b"\0") if b"=" in part)
    return {key: value for key, _, value in pairs}


def same_pid_namespace(pid: int) -> list[Process]:
    """Return the processes that share the PID namespace of `pid`, itself included."""
    link = _namespace(pid)
    return find(lambda process: link is not None and _namespace(process.pid) == link)


def _namespace(pid: int) -> str | None:
    try:
        return str((PROC / str(pid) / "ns" / "pid").readlink())
    except OSError:
        return None


def send(processes: Iterable[Process], number: signal.Signals) -> None:
    """Send a signal to processes, if they are still what they were."""
    for process in processes:
        if read_process(process.pid) == process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def stop(
    processes: Iterable[Process],
    number: signal.Signals = signal.SIGTERM,
    *,
    patience: float = 3.0,
) -> None:
    """Send a signal and wait; what is left after `patience` seconds gets SIGKILL."""
    remaining = list(processes)
    for chosen in (number, signal.SIGKILL):
        send(remaining, chosen)
        still = remaining
        wait_until(lambda still=still: not any(_alive(one) for one in still), patience)  # type: ignore[misc]
        remaining = [process for process in remaining if _alive(process)]
        if not remaining:
            return


def _alive(process: Process) -> bool:
    # Not compared as a whole: programs rewrite their command line while they end.
    now = read_process(process.pid)
    return now is not None and now.name == process.name


def wait_until(condition: Callable[[], bool], seconds: float, *, every: float = 0.02) -> bool:
    """Poll `condition`; return whether it came true within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True
