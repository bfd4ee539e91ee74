"""A prepared folder belongs to one set of settings and to one writing process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpotrain.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_files,
    json_digest,
    read_manifest,
)
from mpotrain.durable import fsync_folder, storage_errors, write_durably
from mpotrain.errors import DataError, StorageError

SETTINGS_NAME = "prepare.json"
LOCK_NAME = "prepare.lock"


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as JSON gives them back, so that they compare equal after a restart."""
    result: dict[str, Any] = json.loads(json.dumps(settings))
    return result


def finished(folder: Path, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a folder that is complete with these settings, else None.

    Args:
        folder: folder that may be complete.
        settings: what decides its content.

    Returns:
        None also where a file of a complete folder is missing or truncated: `claim` then opens
        the folder again, and only what is damaged is written anew.

    Raises:
        DataError: it is complete with other settings; all differences are listed.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(folder)
    if manifest.settings_digest != json_digest(settings):
        _refuse(folder, settings)
    try:
        check_files(folder, manifest)
    except DataError:
        return None
    return manifest


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make sure that a folder belongs to these settings; take it if it is empty.

    Args:
        folder: an existing folder, locked by the caller.
        settings: what decides its content.

    Raises:
        DataError: it was begun with other settings, or holds files of somebody else.
        StorageError: the claim could not be written.
    """
    path = folder / SETTINGS_NAME
    if path.is_file():
        if _read_settings(path) != settings:
            if _has_work(folder):
                _refuse(folder, settings)
            # A first attempt that failed early (no such column, a vocabulary that is too large)
            # must not stand in the way of the corrected command.
            with storage_errors(folder):
                for pattern in ("tokenizer.*", "shard-*"):
                    for leftover in folder.glob(pattern):
                        leftover.unlink()
            _write_settings(path, settings)
        if (folder / MANIFEST_NAME).is_file():
            # Complete but damaged (see `finished`): no reader may take it for whole meanwhile.
            with storage_errors(folder):
                (folder / MANIFEST_NAME).unlink()
                fsync_folder(folder)
        return
    others = [entry.name for entry in folder.iterdir() if not entry.name.startswith("prepare.")]
    if others:
        raise DataError(
            f"{folder} holds other files ({', '.join(sorted(others)[:3])}); name an empty or new "
            "folder as out"
        )
    _write_settings(path, settings)


def _has_work(folder: Path) -> bool:
    """Whether a folder holds at least one finished shard."""
    return (folder / MANIFEST_NAME).is_file() or any(folder.glob("shard-*.json"))


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    write_durably(path, text.encode())


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove the folder") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path} is damaged (no JSON object); remove the folder")
    return settings


def _leaves(value: Any, at: str = "") -> dict[str, Any]:
    """Return nested settings as dotted keys, so that only what differs is shown."""
    if isinstance(value, dict):
        items = [(f"{at}.{key}" if at else str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{at}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {at: value}
    return {key: leaf for name, item in items for key, leaf in _leaves(item, name).items()}


def _refuse(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS_NAME
    before = _leaves(_read_settings(path) if path.is_file() else {})
    now = _leaves(settings)
    lines = [
        f"{key}: {before.get(key, 'absent')} before, {now.get(key, 'absent')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    raise DataError(
        "\n".join(
            [
                f"{folder} was prepared with other settings or from other data; name another "
                "folder as out, or remove this one:",
                *lines,
            ]
        )
    )


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second `prepare` out of a folder; the kernel frees the lock of a killed process.

    Args:
        folder: an existing folder.

    Raises:
        DataError: another process holds the lock.
        StorageError: the folder cannot be written.
    """
    path = folder / LOCK_NAME
    with storage_errors(path):
        stream = path.open("ab")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DataError(
                    f"another `mpotrain prepare` is writing {folder}; wait for it"
                ) from error
            # A file system without locks: the call goes on unguarded.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise StorageError(f"cannot lock {path}: {error.strerror}") from error
        yield
