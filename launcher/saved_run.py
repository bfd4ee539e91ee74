"""What a run folder holds already, against what is to be started in it (no torch).

A job that finds out in the queue that it has nothing to do, or that the checkpoint belongs to
another model, has waited for hours in vain.
"""

from __future__ import annotations

from pathlib import Path

from launcher.launch_error import LaunchError
from launcher.life_log import newest_step, read_outcome
from launcher.run_folder import CHECKPOINTS
from mpotrain.checkpoint.compare import require_model, require_network
from mpotrain.checkpoint.folders import published
from mpotrain.checkpoint.manifest import Manifest, Signature
from mpotrain.checkpoint.manifest_file import read_manifest
from mpotrain.config import RunConfig, RunSettings
from mpotrain.errors import CheckpointError
from mpotrain.schema import to_dict

FINAL = ("done", "held")
"""Outcomes after which nothing is left to do."""


def refuse_finished(run: RunSettings, folder: Path) -> None:
    """Refuse a run that stands at the step at which it is to end.

    Args:
        run: the run.
        folder: its folder.

    Raises:
        LaunchError: nothing is left to do; with how to go on.
    """
    outcome = read_outcome(folder)
    final = outcome if outcome is not None and outcome.outcome in FINAL else None
    step = newest_step(folder)
    if step is None and final is not None:
        step = final.step  # its checkpoints were deleted
    train = run.train
    key = "steps" if train.stop_after is None or train.steps <= train.stop_after else "stop_after"
    last = train.steps if key == "steps" else train.stop_after
    # After its last step a fine-tuning run still has its results to write.
    is_complete = final is not None or isinstance(run, RunConfig)
    if step is None or last is None or step < last or not is_complete:
        return
    word = f" and is {final.outcome}" if final is not None else ""
    raise LaunchError(
        f"{folder}: this run has reached step {step:,}{word}; with train.{key} {last:,} nothing is "
        f"left to do. To train it further give it more steps (train.{key}=...); to train it once "
        "more from the start use another run folder (folder=...)"
    )


def require_same_model(run: RunSettings, folder: Path, where: str) -> None:
    """Refuse a run whose newest checkpoint belongs to another model, as ranks would.

    Of fine-tuning runs only the kind is looked at: what they train stands in their source.

    Args:
        run: the run.
        folder: its folder.
        where: run file, for the message.

    Raises:
        CheckpointError: with the keys that differ.
    """
    manifest = _newest_manifest(folder)
    if manifest is None:
        return
    begun_as_tuning, is_tuning = "task" in manifest.run.config, not isinstance(run, RunConfig)
    if begun_as_tuning != is_tuning:
        kinds = {True: "a fine-tuning run (--task tune)", False: "a pretraining run"}
        raise CheckpointError(
            f"{where}: folder: {folder} holds {kinds[begun_as_tuning]}, but this is "
            f"{kinds[is_tuning]}; choose another folder"
        )
    if not isinstance(run, RunConfig):
        return
    described = to_dict(run)
    try:
        require_model(manifest, _signatures(run), described)
        require_network(manifest, described["model"])
    except CheckpointError as error:
        advice = "set them back, or start a run of its own (folder=...)"
        text = str(error) if advice in str(error) else f"{error}\n{advice}"
        raise CheckpointError(f"{where}: folder: {folder} holds another run: {text}") from error


def _signatures(run: RunConfig) -> dict[str, Signature]:
    tensors = (*run.model.parameters(), *run.model.buffers())
    return {info.name: (info.role, info.shape) for info in tensors}


def _newest_manifest(folder: Path) -> Manifest | None:
    step = newest_step(folder)
    path = None if step is None else published(folder / CHECKPOINTS).get(step)
    return None if path is None else read_manifest(path)
