"""Whether a live process trains into a run folder, without disturbing it."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from mpotrain.checkpoint.lock import LOCK_NAME

_FLOCK = struct.Struct("hhqqi4x")
"""`struct flock` of Linux on 64 bits: type, whence, start, length, process."""


def is_written(checkpoints: Path) -> bool | None:
    """Ask whether a process holds the lock of a folder of checkpoints.

    The lock is only asked for, never taken: a start in the same moment must not be refused.

    Args:
        checkpoints: the folder of the checkpoints.

    Returns:
        True: a process holds it, wherever it runs. False: none that this machine can see. None:
        there is no lock to ask.
    """
    try:
        handle = os.open(checkpoints / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(handle, fcntl.F_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    except OSError:
        return None
    finally:
        os.close(handle)


def holder_of(checkpoints: Path) -> str:
    """Return who took the lock of a folder of checkpoints last, in words.

    Args:
        checkpoints: the folder of the checkpoints.
    """
    try:
        text = (checkpoints / LOCK_NAME).read_bytes()[:200].decode(errors="replace")
    except OSError:
        text = ""
    return " ".join(text.split()) or "an unknown process"
