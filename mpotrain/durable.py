"""Files that are either whole or absent: write aside, fsync, rename, fsync the folder.

A name without a `.tmp-` suffix always stands for a complete file, whatever instant a process was
killed at, because POSIX renames are atomic and the data reached the disk before the rename.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from mpotrain.errors import StorageError

TMP_MARK = ".tmp-"
"""What tells an unfinished file from a finished one."""


def tmp_path(path: Path) -> Path:
    """Return a fresh name beside `path` for its unfinished content."""
    return path.with_name(f"{path.name}{TMP_MARK}{uuid.uuid4().hex[:12]}")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the enclosed writing into a `StorageError` that names `path`.

    Raises:
        StorageError: disk full, quota, file size limit, no permission, broken disk.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot write {path}: {reason}. Files that were complete before are intact; "
            "make room (or mend the permission) and run the same command again."
        ) from error


def fsync_folder(folder: Path) -> None:
    """Force the names in `folder` to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(unfinished: Path, final: Path) -> None:
    """Give a written and fsynced file its final name, durably.

    Raises:
        StorageError: the rename failed.
    """
    with storage_errors(final):
        unfinished.rename(final)
        fsync_folder(final.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all.

    Args:
        path: final name; an earlier file of that name is replaced atomically.
        content: all bytes of the file.

    Raises:
        StorageError: writing failed; no file and no unfinished file is left behind.
    """
    unfinished = tmp_path(path)
    try:
        with storage_errors(path), unfinished.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        publish(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> int:
    """Delete what killed processes left unfinished in `folder`; return how many files.

    The caller makes sure that no other process is writing there.
    """
    leftovers = sorted(folder.glob(f"*{TMP_MARK}*"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
