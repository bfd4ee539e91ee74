"""Turning a folder full of files into a checkpoint, all at once (no torch)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mpotrain.checkpoint.folders import (
    discard,
    new_tag,
    step_name,
    write_pointer,
    write_synced,
)
from mpotrain.checkpoint.manifest import Manifest
from mpotrain.checkpoint.manifest_file import MANIFEST_NAME, encode_manifest
from mpotrain.durable import fsync_folder
from mpotrain.errors import StorageError


def publish(draft: Path, manifest: Manifest, on_point: Callable[[str], None]) -> Path:
    """Give a finished draft its final name; called by one process when all have reported.

    The manifest is made durable first, then one rename makes the checkpoint complete, then the
    pointer names it. A complete checkpoint of the same step is set aside for the moment between
    two renames and deleted afterwards: at no instant is there none.

    Args:
        draft: folder with all data files, on the same file system as its parent.
        manifest: what the files are.
        on_point: told the name of every point that is reached.

    Returns:
        The folder of the checkpoint.

    Raises:
        StorageError: a file that another rank has written is not there, or not whole.
        OSError: from the file system.
    """
    for name, entry in manifest.files.items():
        _require_file(draft / name, entry.bytes)
    write_synced(draft / MANIFEST_NAME, encode_manifest(manifest))
    fsync_folder(draft)
    on_point("manifest")
    folder, final = draft.parent, draft.parent / step_name(manifest.step)
    aside = None
    if final.exists():
        aside = final.rename(final.with_name(f"{final.name}.old-{new_tag()}"))
        fsync_folder(folder)
        on_point("set_aside")
    draft.rename(final)
    fsync_folder(folder)
    on_point("published")
    write_pointer(folder, manifest.step)
    on_point("pointer")
    if aside is not None:
        discard(aside, lambda: on_point("replaced_hidden"))
    return final


def _require_file(path: Path, num_bytes: int) -> None:
    try:
        with path.open("rb") as file:  # over NFS only an open shows the true size
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise StorageError(
            f"{path}: written by another rank, but rank 0 does not see it; the run folder must lie "
            "on a file system that all ranks share"
        ) from error
    if size != num_bytes:
        raise StorageError(f"{path}: rank 0 sees {size} bytes instead of {num_bytes}")
