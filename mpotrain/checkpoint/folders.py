"""Names and moves of checkpoint folders: what is whole, what is left over (no torch).

`step-00000010` is a complete checkpoint. `step-00000010.tmp-<id>` is being written or deleted and
never counts. `step-00000010.old-<id>` is a complete checkpoint while its successor of the same
step takes its place; it counts as long as there is no `step-00000010`.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mpotrain.durable import fsync_folder

POINTER_NAME = "latest"
"""File that names the newest published checkpoint, for people and scripts."""

_STEP = re.compile(r"step-(\d{8,})")
_OLD = re.compile(r"step-(\d{8,})\.old-[0-9a-f]{8}")
_LEFTOVER = re.compile(r"(step-\d{8,}|latest)\.tmp-[0-9a-f]{8}")

logger = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Return the folder name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def new_tag() -> str:
    """Return eight random hexadecimal digits that tell one attempt to save from another."""
    return secrets.token_hex(4)


def published(folder: Path) -> dict[int, Path]:
    """Return the checkpoints with a final name, newest step first.

    Args:
        folder: folder of all checkpoints; may be missing.
    """
    found: dict[int, Path] = {}
    aside: dict[int, Path] = {}
    for path in _entries(folder):
        if (match := _STEP.fullmatch(path.name)) and path.name == step_name(int(match[1])):
            found[int(match[1])] = path
        elif match := _OLD.fullmatch(path.name):
            aside[int(match[1])] = path
    merged = {step: path for step, path in (aside | found).items() if path.is_dir()}
    return dict(sorted(merged.items(), reverse=True))


def recover(folder: Path) -> list[str]:
    """Clean up after saves that died; only the process that owns the folder may call it.

    A checkpoint that was set aside comes back if its successor never took its place; everything
    else that is half written or half deleted goes away.

    Returns:
        Names of what was restored or removed.
    """
    touched = []
    for path in _entries(folder):
        if match := _OLD.fullmatch(path.name):
            final = folder / step_name(int(match[1]))
            if final.exists():
                discard(path)
            else:
                path.rename(final)
                fsync_folder(folder)
        elif _LEFTOVER.fullmatch(path.name):
            remove_tree(path)
        else:
            continue
        touched.append(path.name)
    return touched


def discard(path: Path, on_hidden: Callable[[], None] | None = None) -> bool:
    """Delete a checkpoint so that it is never taken for whole while half of it is gone.

    Args:
        path: folder of the checkpoint, or a link to one.
        on_hidden: called when the folder has its new name and is not yet deleted.

    Returns:
        Whether it no longer counts as a checkpoint; the reason is logged if it still does.
    """
    hidden = path.with_name(f"{path.name.partition('.')[0]}.tmp-{new_tag()}")
    try:
        path.rename(hidden)
        fsync_folder(path.parent)
    except OSError as error:
        logger.warning("%s could not be deleted (%s)", path, error)
        return False
    if on_hidden is not None:
        on_hidden()
    remove_tree(hidden)
    return True


def remove_tree(path: Path) -> None:
    """Delete a folder, link or file; what cannot be deleted is logged and left."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be deleted (%s); it may be deleted by hand", path, error)


def storage_problem(error: OSError, folder: Path) -> str:
    """Say in words why a file could not be written, and how much room is left.

    Args:
        error: what the system said.
        folder: a folder on that file system.
    """
    text = f"{error.filename or folder}: {error.strerror or error}"
    try:
        return f"{text} ({shutil.disk_usage(folder).free:,} bytes are free there)"
    except OSError:
        return text


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that does not exist yet and make its content durable at the end.

    Args:
        path: the file.

    Raises:
        OSError: with the name of the file, which the system leaves out when a write fails.
    """
    try:
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and make its content durable."""
    with new_file(path) as file:
        file.write(data)


def write_pointer(folder: Path, step: int) -> None:
    """Let the pointer file name the checkpoint of `step`, atomically and durably."""
    draft = folder / f"{POINTER_NAME}.tmp-{new_tag()}"
    write_synced(draft, f"{step_name(step)}\n".encode())
    draft.replace(folder / POINTER_NAME)
    fsync_folder(folder)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
