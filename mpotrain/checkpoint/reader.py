"""Reading a checkpoint parameter by parameter, in any layout."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from mpotrain.checkpoint.dcp import load_tensors
from mpotrain.checkpoint.manifest import Manifest
from mpotrain.checkpoint.manifest_file import read_manifest
from mpotrain.checkpoint.storage import TORCH_DTYPES, ManifestReader, full_name
from mpotrain.checkpoint.verify import file_problems
from mpotrain.errors import CheckpointError


class CheckpointReader:
    """Gives the tensors of one checkpoint, one parameter at a time.

    Every process reads what it needs; nothing is collective, and never more than one parameter is
    in memory.

    Attributes:
        folder: folder of the checkpoint.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._storage = ManifestReader(folder, manifest)

    def read(self, name: str, kinds: Collection[str] | None = None) -> dict[str, Tensor]:
        """Read a parameter.

        Args:
            name: logical name of the parameter.
            kinds: what to read, e.g. `("weight",)` for the weight alone; by default everything.

        Returns:
            New CPU tensors of the stored type by kind: `weight`, `exp_avg`, `exp_avg_sq`.

        Raises:
            CheckpointError: no such parameter or kind, or the file cannot be read.
        """
        entry = self.manifest.tensors.get(name)
        if entry is None:
            close = difflib.get_close_matches(name, self.manifest.tensors, n=3)
            hint = f"; it has {', '.join(close)}" if close else ""
            raise CheckpointError(f"{self.folder}: no parameter {name!r} in the checkpoint{hint}")
        wanted = list(entry.kinds) if kinds is None else list(kinds)
        missing = [kind for kind in wanted if kind not in entry.kinds]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {name} was stored without {', '.join(missing)} "
                f"(only {', '.join(entry.kinds)})"
            )
        result = {
            kind: torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.kinds[kind].dtype])
            for kind in wanted
        }
        self.read_into(name, result)
        return result

    def read_into(self, name: str, targets: dict[str, Tensor]) -> None:
        """Read a parameter into tensors that exist; a DTensor receives its own shard.

        Args:
            name: logical name of the parameter.
            targets: destinations by kind, of the parameter's global shape.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            load_tensors(
                {full_name(kind, name): target for kind, target in targets.items()}, self._storage
            )
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error}") from error


def open_checkpoint(folder: Path, *, verify: bool = True) -> CheckpointReader:
    """Open one checkpoint folder, wherever it was copied to; not collective.

    Args:
        folder: folder with a manifest and data files, e.g. `.../step-00000010`.
        verify: compare the digest of every file, not only its size.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    manifest = read_manifest(folder)
    problems = file_problems(folder, manifest, digests=verify)
    if problems:
        raise CheckpointError(f"{folder}: damaged checkpoint:\n" + "\n".join(problems[:5]))
    return CheckpointReader(folder, manifest)
