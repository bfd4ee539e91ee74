"""The training processes under a launcher, and how to tell that all are gone."""

from __future__ import annotations

import contextlib
import subprocess
import time

import psutil


def workers(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Return the training processes under a launcher by rank."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            rank = child.environ().get("RANK")
            if rank is not None and "mpotrain" in " ".join(child.cmdline()):
                # Parents come first: what a rank has just forked looks like the rank itself.
                found.setdefault(int(rank), child)
    return found


def wait_for_workers(
    launcher: subprocess.Popen[str], world: int, timeout: float = 120
) -> dict[int, psutil.Process]:
    """Wait until a launcher has started all its training processes."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        assert launcher.poll() is None, launcher.communicate()[0]
        found = workers(launcher)
        if set(found) == set(range(world)):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{world} ranks were not started")


def still_alive(processes: list[psutil.Process], timeout: float = 120) -> list[psutil.Process]:
    """Return the processes that have not ended in time; they are killed."""
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    for process in alive:
        process.kill()
    return list(alive)
