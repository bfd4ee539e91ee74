"""Space and speed of a folder, as a checkpoint would meet them (no torch)."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mpotrain.durable import tmp_path
from mpotrain.preflight.facts import DiskFacts

BLOCK_BYTES = 4 * 2**20
PROBE_BYTES = 64 * 2**20
"""A file large enough to tell a slow disk, small enough for a thousand nodes at once."""
WRITE_SECONDS = 10.0
"""After this time the measurement ends with what was written."""


def measure_disk(purpose: str, folder: Path, num_bytes: int = PROBE_BYTES) -> DiskFacts:
    """Write a file into a folder, force it to disk, read it back, delete it.

    Args:
        purpose: what the folder is for.
        folder: made if it is missing.
        num_bytes: size of the file.

    Returns:
        Free space (of this user) and speed, or what went wrong.
    """
    free: float | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize / 2**30
        if space.f_files and not space.f_favail:
            return DiskFacts(purpose, str(folder), free, error="no files can be made (inodes)")
        speed = _write_and_read(tmp_path(folder / "preflight-probe"), num_bytes)
    except OSError as error:
        reason = error.strerror or str(error)
        return DiskFacts(purpose, str(folder), free, error=f"cannot be written ({reason})")
    if speed is None:
        wrong = "what was read is not what was written"
        return DiskFacts(purpose, str(folder), free, error=wrong)
    return DiskFacts(purpose, str(folder), free, speed)


def _write_and_read(path: Path, num_bytes: int) -> float | None:
    """Return MiB per second; None if the content came back changed."""
    # Random bytes, so that a file system that compresses or shares blocks gains nothing.
    block = os.urandom(BLOCK_BYTES)
    blocks = 0
    try:
        start = time.monotonic()
        with path.open("wb", buffering=0) as file:
            while blocks * BLOCK_BYTES < num_bytes and time.monotonic() - start < WRITE_SECONDS:
                _write_all(file.fileno(), _marked(block, blocks))
                blocks += 1
            os.fsync(file.fileno())
        seconds = time.monotonic() - start
        with path.open("rb") as file:
            same = all(file.read(BLOCK_BYTES) == _marked(block, k) for k in range(blocks))
            same = same and not file.read(1)
    finally:
        path.unlink(missing_ok=True)
    return blocks * BLOCK_BYTES / 2**20 / seconds if same else None


def _marked(block: bytes, number: int) -> bytes:
    return number.to_bytes(8, "little") + block[8:]


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
