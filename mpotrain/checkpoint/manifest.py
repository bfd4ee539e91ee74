"""The manifest: everything about a checkpoint except the numbers (JSON, no torch).

A checkpoint is a folder with a manifest and data files; it is complete when the folder has its
final name, and the manifest then lists every file with its size and digest.
`mpotrain.checkpoint.manifest_file` writes and reads it.
"""

from __future__ import annotations

import json
import re
from math import prod
from typing import Any

import xxhash

from mpotrain.schema import config

WEIGHT = "weight"
"""Kind of the weight itself; every other kind is state of the optimizer, e.g. `exp_avg`."""
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1,
}  # fmt: skip
"""Bytes for each element, by the names of the safetensors format."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_KIND = re.compile(r"[a-z][a-z0-9_]*")


@config
class FileEntry:
    """Size and digest of a data file."""

    bytes: int
    """Size in bytes."""
    digest: str
    """XXH3 128-bit digest, 32 hexadecimal digits."""


@config
class Placement:
    """Where a tensor lies: little-endian elements in C order."""

    file: str
    """Name of the data file in the checkpoint's folder."""
    offset: int
    """First byte in the file."""
    bytes: int
    """Number of bytes."""
    dtype: str
    """Element type by its safetensors name, e.g. `F32`."""


@config
class TensorEntry:
    """A parameter with its optimizer state."""

    role: str
    """Value of `mpotrain.nn.roles.Role`."""
    shape: tuple[int, ...]
    """Global shape, the same for every kind."""
    kinds: dict[str, Placement]
    """The weight (`weight`) and its moments (`exp_avg`, `exp_avg_sq`), each with its place."""


@config
class RngRule:
    """How randomness follows from counters, so that no generator state is stored."""

    seed: int
    """Seed of the run."""
    rule: str
    """Name of the rule that mixes seed, step and micro-batch."""


@config
class RunState:
    """The position of a run: what a checkpoint holds besides tensors and files."""

    step: int
    """Number of finished steps."""
    consumed_samples: int
    """Sequences read from the data; the whole state of the data loader."""
    num_updates: int
    """Optimizer updates made (Adam's counter); less than `step` where steps were skipped."""
    config: dict[str, Any]
    """The resolved run configuration."""
    data_fingerprint: str | None
    """Digest of the token shards and their order."""
    rng: RngRule
    """Seed and rule of all randomness."""
    engine: dict[str, Any]
    """Engine and layout that wrote the checkpoint, for people; loading does not depend on it."""
    train_state: dict[str, Any]
    """Counters of the training loop (tokens seen, anomalies, ...)."""


@config
class Manifest:
    """The whole manifest of a complete checkpoint."""

    format: int
    """Version of the format."""
    run: RunState
    """Position of the run."""
    versions: dict[str, str]
    """Versions of the libraries that wrote the checkpoint."""
    fingerprint: str
    """Digest of the names, roles and shapes of all parameters."""
    tensors: dict[str, TensorEntry]
    """Every parameter by its logical name."""
    files: dict[str, FileEntry]
    """Every data file by its name."""

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.run.step

    @property
    def num_bytes(self) -> int:
        """Size of all data files in bytes."""
        return sum(entry.bytes for entry in self.files.values())

    def problems(self) -> list[str]:
        """Return every contradiction inside the manifest, one line each."""
        found = [
            f"files.{name}: not a plain file name or not a digest"
            for name, entry in self.files.items()
            if not _FILE_NAME.fullmatch(name) or not re.fullmatch("[0-9a-f]{32}", entry.digest)
        ]
        for name, tensor in self.tensors.items():
            if WEIGHT not in tensor.kinds:
                found.append(f"tensors.{name}: has no weight (kind {WEIGHT!r})")
            for kind, place in tensor.kinds.items():
                problem = self._placement_problem(kind, tensor.shape, place)
                if problem:
                    found.append(f"tensors.{name}.kinds.{kind}: {problem}")
        if self.fingerprint != fingerprint(signatures(self)):
            found.append("fingerprint: does not belong to these tensors")
        return found

    def _placement_problem(self, kind: str, shape: tuple[int, ...], place: Placement) -> str | None:
        if not _KIND.fullmatch(kind):
            return "not the name of a kind"
        if place.file not in self.files:
            return f"lies in {place.file!r}, which is not among the files"
        if place.dtype not in DTYPE_BYTES:
            return f"unknown element type {place.dtype!r}"
        if any(size < 0 for size in shape):
            return f"impossible shape {list(shape)}"
        needed = prod(shape) * DTYPE_BYTES[place.dtype]
        if place.bytes != needed:
            return f"{place.bytes} bytes, but shape {list(shape)} in {place.dtype} needs {needed}"
        if place.offset < 0 or place.offset + place.bytes > self.files[place.file].bytes:
            return f"reaches beyond the end of {place.file}"
        return None


Signature = tuple[str, tuple[int, ...]]
"""Role and global shape of a parameter."""


def signatures(manifest: Manifest) -> dict[str, Signature]:
    """Return role and shape of every parameter in a checkpoint, by logical name."""
    return {name: (entry.role, entry.shape) for name, entry in manifest.tensors.items()}


def fingerprint(parameters: dict[str, Signature]) -> str:
    """Return a digest of names, roles and shapes; the order does not matter."""
    lines = (json.dumps([name, *parameters[name]]) for name in sorted(parameters))
    return str(xxhash.xxh3_128_hexdigest("\n".join(lines).encode()))
