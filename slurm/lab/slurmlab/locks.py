"""File locks: one command at a time changes a lab, one lab at a time takes addresses."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from slurmlab.settings import LabError

MACHINE_LOCK = Path("/tmp/slurm-lab.lock")
"""Held while a lab chooses its slot; shared by all users of the machine, never deleted."""


@contextlib.contextmanager
def held(path: Path, *, seconds: float = 180.0) -> Iterator[None]:
    """Hold the lock file `path`, waiting up to `seconds` for whoever has it.

    Raises:
        LabError: it stayed taken.
    """
    end = time.monotonic() + seconds
    while True:
        descriptor = _open(path)
        if _try_lock(descriptor) and _is_current(descriptor, path):
            break
        os.close(descriptor)
        if time.monotonic() > end:
            raise LabError(f"another command has held {path} for {seconds:.0f} s; try again later")
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    # Reading is enough to lock, and is all that another user's file in /tmp allows.
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with contextlib.suppress(FileExistsError):
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(descriptor: int, path: Path) -> bool:
    # The holder before may have deleted the file: a lock on that one protects nothing.
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
