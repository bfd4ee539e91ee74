"""The pretrained encoder under a fine-tuning run: from its source, or as the run remembers it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpotrain.checkpoint.compare import require_model
from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.manifest import Manifest
from mpotrain.checkpoint.reader import CheckpointReader
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.config import RunConfig
from mpotrain.config_file import validate
from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.masked_config import MaskedConfig
from mpotrain.data.tokenizer import IdentityTokenizer, Tokenizer, open_tokenizer
from mpotrain.errors import CheckpointError, ConfigError
from mpotrain.layered_toml import LayeredTable
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.run_record import CHECKPOINTS
from mpotrain.schema import config, to_dict
from mpotrain.trained import (
    SINGLE,
    find_checkpoint,
    find_tokenizer,
    saved_run,
    saved_tokenizer,
)

KEY = "encoder"
"""Where the checkpoints of a fine-tuning run keep their foundation, in the configuration."""


@config
class Foundation:
    """What a fine-tuning run takes over beside weights; kept in each of its checkpoints."""

    origin: str
    """Checkpoint that the weights came from, for people."""
    model: EncoderConfig
    """Sizes and sites of the encoder."""
    tokenizer: TokenizerEntry
    """The tokenizer that it was pretrained with."""
    cls_id: int
    """Id before every sequence."""
    sep_id: int
    """Id after every text."""

    def problems(self) -> list[str]:
        """Return every contradiction, one line each."""
        return self.model.problems("model")


@dataclass(frozen=True)
class OpenedFoundation:
    """A foundation with its files.

    Attributes:
        foundation: the encoder's description.
        tokenizer: turns text into ids.
        tokenizer_path: its file; None where texts are ids already.
        weights: checkpoint with the pretrained weights; None where the run has its own already.
    """

    foundation: Foundation
    tokenizer: Tokenizer
    tokenizer_path: Path | None
    weights: CheckpointReader | None


def open_foundation(source: Path, folder: Path) -> OpenedFoundation:
    """Open the encoder of a fine-tuning run.

    Args:
        source: pretraining run or checkpoint; need not be there any more where the run has begun.
        folder: folder of the fine-tuning run.

    Raises:
        ConfigError: the source is no pretrained encoder.
        CheckpointError: there is no sound checkpoint, or the run folder holds another kind of run.
        DataError: the tokenizer is gone.
    """
    manifest = newest_manifest(folder)
    if manifest is None:
        return _from_source(source)
    foundation = _remembered(manifest, folder)
    began = manifest.run.config.get("source")
    if began is not None and Path(began).resolve() != source.resolve():
        raise ConfigError(
            [
                f"source: {source}, but the run in {folder} began with {began}; set it back, or "
                "choose another folder (folder=...)"
            ]
        )
    path, tokenizer = _tokenizer(foundation.tokenizer, [folder])
    return OpenedFoundation(foundation, tokenizer, path, None)


def newest_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of the newest checkpoint of a run folder; None before the first."""
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.is_dir():
        return None
    # Digests are compared when the run is taken up.
    return CheckpointStore(checkpoints, CheckpointConfig(verify=False), SINGLE).latest()


def _remembered(manifest: Manifest, folder: Path) -> Foundation:
    described = manifest.run.config.get(KEY)
    if not isinstance(described, dict):
        raise CheckpointError(
            f"{folder}: holds a run of another kind (no fine-tuning); choose another folder"
        )
    table = LayeredTable()
    table.merge(described, f"checkpoint of step {manifest.step}, {KEY}")
    return validate(Foundation, table)


def _from_source(source: Path) -> OpenedFoundation:
    try:
        store, manifest = find_checkpoint(source, None)
    except CheckpointError as error:
        raise CheckpointError(f"source: {error}") from error
    if KEY in manifest.run.config:
        raise ConfigError(
            [f"source: {source} is a fine-tuning run; name the pretraining run it began with"]
        )
    run = saved_run(manifest)
    model, objective = _encoder_of(run, source)
    require_model(manifest, {p.name: (p.role, p.shape) for p in run.model.parameters()})
    entry = saved_tokenizer(manifest)
    marks = objective.special(entry)
    places = [store.folder.parent, *(Path(s.path) for s in run.data.sources)]
    path, tokenizer = _tokenizer(entry, places)
    foundation = Foundation(
        origin=f"{store.folder.parent}, step {manifest.step}",
        model=model,
        tokenizer=entry,
        cls_id=marks.cls,
        sep_id=marks.sep,
    )
    return OpenedFoundation(foundation, tokenizer, path, store.open(manifest.step))


def _encoder_of(run: RunConfig, source: Path) -> tuple[EncoderConfig, MaskedConfig]:
    """Return model and objective of a pretrained encoder.

    Raises:
        ConfigError: it is another network, or was trained for something else.
    """
    model, objective = run.model, run.data.objective
    if not isinstance(model, EncoderConfig):
        raise ConfigError(
            [
                f"source: {source} holds a model of kind {model.kind}; only encoders "
                '(model.kind="encoder") can be fine-tuned for classification'
            ]
        )
    if not isinstance(objective, MaskedConfig):
        raise ConfigError(
            [f"source: {source} was trained with data.objective {objective.kind}, not masked"]
        )
    return model, objective


def _tokenizer(entry: TokenizerEntry, places: list[Path]) -> tuple[Path | None, Tokenizer]:
    if entry.file is None:
        return None, IdentityTokenizer(entry.vocab_size, entry.eot_id)
    path = find_tokenizer(entry, places)
    return path, open_tokenizer(path, entry.eot_id)


def described(foundation: Foundation) -> dict[str, Any]:
    """Return what a checkpoint keeps of a foundation, below its key."""
    return {KEY: to_dict(foundation)}
