"""`mpotrain export`: a trained model as a folder that transformers loads, or nothing at all."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpotrain import __version__
from mpotrain.convert.fill import fill
from mpotrain.convert.hub import CONFIG_FILE, WEIGHTS_FILE, hub_source, safetensors_library
from mpotrain.convert.hub_family import HubFamily
from mpotrain.convert.hub_form import hub_form, id_settings
from mpotrain.convert.probe import difference, drawn_rows, probe_batch, source_outputs
from mpotrain.convert.source import Source, run_source
from mpotrain.durable import fsync_folder, publish, storage_errors, tmp_path
from mpotrain.errors import CheckpointError, ConfigError, StorageError
from mpotrain.models.config import AnyModel

TOLERANCE = 1e-5
"""Largest difference of scores over the largest score that passes for rounding (fp32)."""

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
"""A tokenizer of the Hugging Face library, and what says how to open it."""


@dataclass(frozen=True)
class Export:
    """What an export did.

    Attributes:
        origin: the model that was written.
        path: folder that was written.
        architecture: class of transformers that has all of its weights.
        num_parameters: of the dense model.
        source_parameters: of ours.
        notes: what is not as in ours.
        tokenizer: name of the tokenizer file; None where there is none.
        difference: largest difference of scores over the largest score.
    """

    origin: str
    path: Path
    architecture: str
    num_parameters: int
    source_parameters: int
    notes: list[str]
    tokenizer: str | None
    difference: float

    def describe(self) -> str:
        """Return the result as text."""
        files = [CONFIG_FILE, WEIGHTS_FILE] + ([self.tokenizer] if self.tokenizer else [])
        lines = [
            f"{self.origin}: {self.source_parameters:,} parameters",
            *(f"  {note}" for note in self.notes),
            f"scores differ by {self.difference:.1e} of the largest",
            f"{self.path}: {self.architecture} with {self.num_parameters:,} parameters "
            f"({', '.join(files)})",
        ]
        if self.tokenizer is None:
            lines.append("no tokenizer file lies in the run folder; none was written")
        elif self.tokenizer != TOKENIZER_FILE:
            lines.append(
                f"AutoTokenizer does not read {self.tokenizer}: open it with sentencepiece"
            )
        return "\n".join(lines)


def export(folder: Path, step: int | None, out: Path, *, tolerance: float = TOLERANCE) -> Export:
    """Write a trained model as a Hugging Face folder.

    Matrices of any representation are rebuilt, adapters folded in. The folder is read again and
    compared before it gets its name.

    Args:
        folder: a run folder, or one of its checkpoints.
        step: step of the checkpoint; None for the newest.
        out: folder to write; must not exist.
        tolerance: largest difference of scores over the largest score.

    Raises:
        ConfigError: the folder exists, or Hugging Face has no such model.
        CheckpointError: there is no sound checkpoint, or the weights are not finite.
        StorageError: a file could not be written; nothing is left behind.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError([f"command line: OUT: {out} exists; name a folder that does not"])
    source = run_source(folder, step)
    family, plain = hub_form(source.config, source.origin)
    filled = fill(plain, source, {})
    settings = {
        "model_type": family.model_type,
        **family.write(plain),
        **id_settings(source.special),
        "dtype": "float32",
    }
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    draft = tmp_path(out)
    try:
        tokenizer = _write(draft, settings, family.give(plain, filled.weights), source)
        found = _check(draft, family, plain, filled.weights, source)
        _require_equal(found, tolerance, source, family)
        publish(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Export(
        origin=source.origin,
        path=out,
        architecture=settings["architectures"][0],
        num_parameters=plain.num_parameters(),
        source_parameters=source.config.num_parameters(),
        notes=filled.notes,
        tokenizer=tokenizer,
        difference=found,
    )


def _write(
    folder: Path, settings: Mapping[str, Any], tensors: dict[str, Tensor], source: Source
) -> str | None:
    """Write all files of a folder to disk and return the name of the tokenizer file."""
    safetensors = safetensors_library("OUT: writing")
    save = importlib.import_module("safetensors.torch").save_file
    metadata = {"format": "pt", "mpotrain": __version__}
    tokenizer = source.tokenizer_files[0] if source.tokenizer_files else None
    with storage_errors(folder):
        folder.mkdir()
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / tokenizer.name)
        if tokenizer is not None and tokenizer.name == TOKENIZER_FILE:
            # Without it AutoTokenizer takes the class that usually goes with the model.
            said = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"
            (folder / TOKENIZER_CONFIG).write_text(said, encoding="utf-8")
        try:
            save(tensors, folder / WEIGHTS_FILE, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise StorageError(f"cannot write {folder / WEIGHTS_FILE}: {error}") from error
        # The library writes for the owner alone, whatever the process grants to others.
        shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        for path in folder.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        fsync_folder(folder)
    return None if tokenizer is None else tokenizer.name


def _check(
    folder: Path,
    family: HubFamily[Any],
    plain: AnyModel,
    weights: Mapping[str, Tensor],
    source: Source,
) -> float:
    """Read a folder again and return how far its scores are from those of the source.

    Raises:
        CheckpointError: it does not hold what was written.
    """
    found = hub_source(folder, str(folder))
    changed = [name for name in weights if not torch.equal(found.weights[name], weights[name])]
    if changed:
        raise CheckpointError(
            f"{folder}: {changed[0]} is not what was written ({family.label}); nothing is kept"
        )
    batch = probe_batch(plain, drawn_rows(plain))
    return difference(source_outputs(source, batch), source_outputs(found, batch))


def _require_equal(found: float, tolerance: float, source: Source, family: HubFamily[Any]) -> None:
    if not found <= tolerance:
        raise CheckpointError(
            f"{source.origin}: scores of the {family.label} made of it differ by {found:.1e} of "
            f"the largest, more than --tolerance {tolerance:g}; nothing is written"
        )
