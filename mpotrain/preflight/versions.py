"""Which software a node would run: a job whose nodes differ fails late and strangely."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

import mpotrain
from mpotrain.provenance import git_state

LIBRARIES = ("torch", "deepspeed", "megatron-core", "transformer-engine", "numpy")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
ABSENT = "absent"


def node_versions() -> dict[str, str | None]:
    """Return what must be equal on all nodes, by name; None where it cannot be known."""
    package = Path(mpotrain.__file__).resolve().parent
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "mpotrain": mpotrain.__version__,
        "mpotrain source": source_digest(package),
        "git commit": _commit(package),
        "CUDA of torch": torch.version.cuda or ABSENT,
        "NCCL": _nccl() or ABSENT,
        "NVIDIA driver": driver_version(DRIVER_FILE) or ABSENT,
    }
    return found | {name: _version(name) or ABSENT for name in LIBRARIES}


def source_digest(package: Path) -> str:
    """Return a digest of all Python files of a package: equal where the code is the same.

    Args:
        package: folder of the package.
    """
    digest = xxhash.xxh3_64()
    for path in sorted(_sources(package)):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def driver_version(file: Path) -> str | None:
    """Return the version of the NVIDIA kernel module; None where there is none.

    Args:
        file: where the module says it.
    """
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)*)", text)
    return None if match is None else match[1]


def _sources(package: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(package):
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _commit(package: Path) -> str | None:
    # Nodes without git, or without the work tree, know none; the digest compares the code itself.
    state = git_state(package)
    return None if state is None else str(state["commit"])


def _nccl() -> str | None:
    if not torch.cuda.is_available():
        return None
    version: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
