"""`mpotrain convert`: a trained model becomes the step 0 of a run, or nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mpotrain.assemble import build_model, open_data
from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.config import RunConfig
from mpotrain.convert.checks import Target, conversion_problems
from mpotrain.convert.fill import Filled, fill
from mpotrain.convert.hub import CONFIG_FILE, HUB_MARK, download, hub_source
from mpotrain.convert.matrices import SiteError
from mpotrain.convert.probe import data_rows, difference, outputs, probe_batch, source_outputs
from mpotrain.convert.source import Source, run_source
from mpotrain.convert.vocabulary import tokenizer_problem
from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.objective import open_objective
from mpotrain.engine.base import WEIGHT, StateTensor
from mpotrain.engine.state import host_copy
from mpotrain.engine.statistics import export_buffers
from mpotrain.errors import ConfigError
from mpotrain.nn.roles import role_of
from mpotrain.run_record import CHECKPOINTS, position_of, record_start
from mpotrain.train.anomaly import AnomalyGuard
from mpotrain.train.state import RunState
from mpotrain.trained import SINGLE

TOLERANCE = 1e-5
"""Largest difference of scores over the largest score that passes for rounding (fp32)."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        origin: the model that was taken over.
        path: folder of the checkpoint that was written.
        num_parameters: of the new model.
        source_parameters: of the model that was taken over.
        errors: what each decomposed matrix has lost.
        notes: what is not as in the source.
        difference: largest difference of scores over the largest score.
        probe: size of the batch (sequences, tokens) on which the scores were compared.
    """

    origin: str
    path: Path
    num_parameters: int
    source_parameters: int
    errors: list[SiteError]
    notes: list[str]
    difference: float
    probe: tuple[int, int]

    def describe(self) -> str:
        """Return the result as text."""
        lines = [
            f"{self.origin}: {self.source_parameters:,} parameters",
            *map(_error_line, self.errors),
            *(f"  {note}" for note in self.notes),
            f"scores differ by {self.difference:.1e} of the largest, on {self.probe[0]} sequences "
            f"of {self.probe[1]} tokens",
            f"{self.path}: step 0 with {self.num_parameters:,} parameters; train, eval and "
            "generate go on from here",
        ]
        return "\n".join(lines)


def convert(
    source: str,
    step: int | None,
    run: RunConfig,
    target: Target,
    *,
    tolerance: float = TOLERANCE,
    allow_truncation: bool = False,
) -> Conversion:
    """Write a trained model as step 0 into the folder of a run.

    Args:
        source: a run folder or checkpoint, a folder of a Hugging Face model, or `hf:NAME`.
        step: step of a run's checkpoint; None for the newest.
        run: the run that takes the model over.
        target: what it is converted to.
        tolerance: largest difference of scores over the largest score.
        allow_truncation: write even if truncated bonds make the difference larger.

    Returns:
        What was done.

    Raises:
        MpotrainError: the model cannot be read, does not fit the run, or would compute something
            else; nothing is written then.
    """
    given = open_source(source, step)
    problems = conversion_problems(given, run, target)
    if problems:
        raise ConfigError(problems)
    dataset = open_data(run, "train")
    if (problem := tokenizer_problem(given, dataset)) is not None:
        raise ConfigError([problem])
    open_objective(dataset)  # what `train` would refuse is refused here
    model = build_model(run.model, seed=run.train.seed, dtype="fp32").eval()
    filled = fill(run.model, given, dict(model.named_parameters()))
    _copy(filled, model)
    batch = probe_batch(run.model, data_rows(dataset))
    # Heads that the source lacks are those of the new model, so that all outputs can be compared.
    heads = {name: filled.weights[name] for name in given.fresh if name in filled.weights}
    given = replace(given, weights={**heads, **given.weights})
    found = difference(source_outputs(given, batch), outputs(model, batch))
    if not math.isfinite(found):
        raise ConfigError(
            [f"{given.origin}: scores are not finite, or overflow; nothing is written"]
        )
    if filled.is_exact:
        _require_equal(found, tolerance, filled.errors, allow_truncation)
    elif not allow_truncation:
        _require_whole(filled.errors, tolerance)
    rows = batch.inputs if batch.encoder_inputs is None else batch.encoder_inputs
    return Conversion(
        origin=given.origin,
        path=_write(run, model, dataset, given.origin),
        num_parameters=run.model.num_parameters(),
        source_parameters=given.config.num_parameters(),
        errors=filled.errors,
        notes=filled.notes,
        difference=found,
        probe=(rows.shape[0], rows.shape[1]),
    )


def open_source(source: str, step: int | None) -> Source:
    """Read the model that a command line names; see `convert`."""
    is_hub = source.startswith(HUB_MARK)
    folder = Path(source)
    if not is_hub and not (folder / CONFIG_FILE).is_file():
        return run_source(folder, step)
    if step is not None:
        raise ConfigError(
            [f"command line: --step {step}: {source} is no run of ours, it has no steps"]
        )
    folder = download(source.removeprefix(HUB_MARK)) if is_hub else folder
    return hub_source(folder, source)


def _copy(filled: Filled, model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(filled.weights[name])


def _require_equal(
    difference: float, tolerance: float, errors: list[SiteError], allow_truncation: bool
) -> None:
    if difference <= tolerance:
        return
    truncated = [error for error in errors if error.truncated]
    if truncated and allow_truncation:
        return
    text = f"scores differ by {difference:.1e} of the largest, more than --tolerance {tolerance:g}"
    if not truncated:
        raise ConfigError(
            [f"command line: {text}, although no bond is truncated; nothing is written"]
        )
    lines = [
        f"command line: {text}, because bonds are truncated; leave bonds and caps out for an exact "
        "copy, or accept the loss with --allow-truncation. Nothing is written",
        *map(_error_line, truncated),
    ]
    raise ConfigError(["\n".join(lines)])


def _require_whole(errors: list[SiteError], tolerance: float) -> None:
    """Refuse truncated matrices where scores differ anyway and cannot tell of them."""
    lost = [error for error in errors if error.truncated and not error.error <= tolerance]
    if lost:
        text = (
            f"command line: bonds are truncated by more than --tolerance {tolerance:g}; leave "
            "bonds and caps out, or accept the loss with --allow-truncation. Nothing is written"
        )
        raise ConfigError(["\n".join([text, *map(_error_line, lost)])])


def _write(run: RunConfig, model: nn.Module, dataset: BlendedDataset, origin: str) -> Path:
    """Write the run folder: the checkpoint first, then what describes the run."""
    store = CheckpointStore(Path(run.folder) / CHECKPOINTS, CheckpointConfig(), SINGLE)
    position = position_of(
        run,
        dataset,
        RunState(),
        {"anomaly": AnomalyGuard(run.train.anomaly).state_dict(), "counters": {}},
        {"kind": "convert", "source": origin},
    )
    try:
        store.claim()
        path = store.save(position, _state(model))
        # Later than the checkpoint: a folder that looks begun must not begin from random weights.
        record_start(run, SINGLE, 0, dataset.tokenizer_path)
        return path
    finally:
        store.close()


def _state(model: nn.Module) -> Iterator[StateTensor]:
    for name, parameter in model.named_parameters():
        weight = {WEIGHT: host_copy(parameter)}
        yield StateTensor(name, role_of(parameter), tuple(parameter.shape), weight)
    yield from export_buffers(model, SINGLE)


def _error_line(error: SiteError) -> str:
    bonds = ", ".join(map(str, error.bonds))
    word = "truncation error" if error.truncated else "exact, rounding"
    return f"  {error.name}: bonds {bonds}; {word} {error.error:.1e}"
