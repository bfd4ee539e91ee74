"""Writing and reading the manifest as JSON that vouches for itself (no torch).

The last entry is a digest of all bytes before it: one flipped bit anywhere in the file is seen.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import xxhash
from pydantic import TypeAdapter, ValidationError

from mpotrain.checkpoint.manifest import Manifest
from mpotrain.errors import CheckpointError

FORMAT = 1
"""Version of the format that this code writes and reads."""
MANIFEST_NAME = "manifest.json"
"""Name of the manifest in the folder of a checkpoint."""

_TAIL = re.compile(rb',\n "digest": "([0-9a-f]{32})"\n}\n')
_TAIL_BYTES = len(b',\n "digest": ""\n}\n') + 32


def library_versions() -> dict[str, str]:
    """Return the versions that matter for reading a checkpoint, by library."""
    versions = {"python": platform.python_version()}
    for name in ("mpotrain", "torch", "deepspeed", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as JSON text whose last entry is the digest of all bytes before it.

    Raises:
        CheckpointError: a free section (`config`, `engine`, `train_state`) holds something that
            JSON cannot represent, such as NaN or an object.
    """
    data = dataclasses.asdict(manifest)
    for section in ("config", "engine", "train_state"):
        bad = _not_json(data["run"][section], f"run.{section}")
        if bad:
            raise CheckpointError(f"step {manifest.step}: cannot write the manifest: {bad}")
    body = json.dumps(data, indent=1, allow_nan=False).encode().removesuffix(b"\n}")
    digest = xxhash.xxh3_128_hexdigest(body)
    return body + f',\n "digest": "{digest}"\n}}\n'.encode()


def decode_manifest(text: bytes, where: str) -> Manifest:
    """Read a manifest strictly.

    Args:
        text: content of the file.
        where: path for messages.

    Raises:
        CheckpointError: damaged, edited, of another format version or contradicting itself.
    """
    body, tail = text[:-_TAIL_BYTES], _TAIL.fullmatch(text[-_TAIL_BYTES:])
    if tail is None:
        raise CheckpointError(f"{where}: the end of the manifest is missing or damaged")
    if xxhash.xxh3_128_hexdigest(body).encode() != tail[1]:
        raise CheckpointError(f"{where}: the digest does not match: damaged or edited")
    try:
        version = json.loads(body + b"\n}")["format"]
        if version != FORMAT:
            raise CheckpointError(
                f"{where}: format {version!r}, but this version of mpotrain reads {FORMAT}"
            )
        manifest = _adapter().validate_json(body + b"\n}")
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
            for detail in error.errors(include_url=False, include_input=False)[:5]
        ]
        raise CheckpointError(f"{where}: " + "; ".join(lines)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a manifest: {error}") from error
    problems = manifest.problems()
    if problems:
        raise CheckpointError(f"{where}: " + "; ".join(problems[:5]))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in `folder`.

    Raises:
        CheckpointError: missing, unreadable, damaged or not a manifest.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return decode_manifest(text, str(path))


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _not_json(value: Any, where: str) -> str | None:
    """Return the first thing in `value` that JSON cannot hold, with its dotted key."""
    if isinstance(value, dict):
        bad = next((key for key in value if not isinstance(key, str)), None)
        if bad is not None:
            return f"{where}: key {bad!r} is not text"
        children = [(item, f"{where}.{key}") for key, item in value.items()]
    elif isinstance(value, list | tuple):
        children = [(item, f"{where}[{index}]") for index, item in enumerate(value)]
    elif value is None or isinstance(value, str | int):
        return None
    elif isinstance(value, float):
        finite = value == value and value not in (float("inf"), float("-inf"))
        return None if finite else f"{where}: {value} is not a JSON number"
    else:
        return f"{where}: {type(value).__name__} cannot be written as JSON"
    return next((bad for item, at in children if (bad := _not_json(item, at))), None)
