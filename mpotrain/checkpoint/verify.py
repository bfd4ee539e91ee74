"""Comparing the files of a checkpoint with its manifest (no torch)."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from mpotrain.checkpoint.manifest import Manifest

BLOCK_BYTES = 8 << 20
"""Bytes read at once; the digest takes them in blocks too."""
NUM_THREADS = 4
"""Files read side by side: one stream does not fill a parallel file system."""


def digest_file(path: Path) -> str:
    """Return the XXH3 128-bit digest of a file as 32 hexadecimal digits."""
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return str(hasher.hexdigest())


def file_problems(
    folder: Path,
    manifest: Manifest,
    *,
    digests: bool,
    names: Iterable[str] | None = None,
    on_file: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return what is wrong with the data files of a checkpoint, one line for each file.

    Args:
        folder: folder of the checkpoint.
        manifest: what the files should be.
        digests: compare the content, not only the size.
        names: the files to look at; by default all.
        on_file: called after each file.
    """
    chosen = list(manifest.files if names is None else names)
    found = []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for line in pool.map(lambda name: _problem(folder, manifest, name, digests), chosen):
            on_file()
            if line:
                found.append(line)
    return found


def _problem(folder: Path, manifest: Manifest, name: str, digests: bool) -> str | None:
    path, entry = folder / name, manifest.files[name]
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{path}: not a regular file"
        if status.st_size != entry.bytes:
            return f"{path}: {status.st_size} bytes instead of {entry.bytes}"
        if digests and digest_file(path) != entry.digest:
            return f"{path}: the content has changed since it was written (digest differs)"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None
