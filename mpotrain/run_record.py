"""What a run leaves beside checkpoints and metrics: configuration and surroundings.

The environment is recorded by allow-list: versions, devices, git state. Environment variables,
which may hold secrets, are never written.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from mpotrain.checkpoint.manifest import RngRule
from mpotrain.checkpoint.manifest import RunState as SavedState
from mpotrain.checkpoint.manifest_file import library_versions
from mpotrain.config import RunSettings, dump_config
from mpotrain.data.manifest import TokenizerEntry
from mpotrain.durable import write_durably
from mpotrain.errors import StorageError
from mpotrain.parallel.ranks import World
from mpotrain.provenance import git_state
from mpotrain.run_end import OUTCOME_FILE
from mpotrain.schema import to_dict
from mpotrain.train.state import RunState

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the run folder."""
RNG_RULE = "splitmix64(seed, step, microbatch)"
CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "environment.jsonl"


class TrainingData(Protocol):
    """What a checkpoint and a run folder say of training data."""

    @property
    def digest(self) -> str:
        """Fingerprint as one text: equal where sample i is the same for every i."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what sample i is, in JSON types."""

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer of the text."""

    @property
    def tokenizer_path(self) -> Path | None:
        """File of the tokenizer; None where there is none."""


def record_start(run: RunSettings, world: World, step: int, tokenizer: Path | None) -> None:
    """Write the resolved configuration and the tokenizer, and add a line about this start.

    Args:
        run: the resolved run.
        world: the ranks of this start.
        step: step from which this start goes on.
        tokenizer: file of the tokenizer of the data; None where the data have none.

    Raises:
        StorageError: the run folder cannot be written.
    """
    folder = Path(run.folder)
    line = {
        "time": time.time(),
        "step": step,
        "world_size": world.size,
        "device": _device_name(world.device),
        "host": platform.node(),
        "versions": library_versions(),
        "git": git_state(Path(__file__).resolve().parent),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / CONFIG_FILE, dump_config(run).encode())
        if tokenizer is not None:
            write_durably(folder / tokenizer.name, tokenizer.read_bytes())
        with (folder / ENVIRONMENT_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        (folder / OUTCOME_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error})") from error


def position_of(
    run: RunSettings,
    data: TrainingData,
    state: RunState,
    counters: Mapping[str, Any],
    engine: Mapping[str, Any],
) -> SavedState:
    """Return what a checkpoint says of a run beside its tensors.

    Args:
        run: the resolved run.
        data: what it is trained on.
        state: where it stands.
        counters: state of the anomaly guard (`anomaly`), counters of the engine (`counters`).
        engine: what wrote the checkpoint, for people.
    """
    return SavedState(
        step=state.step,
        consumed_samples=state.consumed_samples,
        num_updates=state.num_updates,
        config=to_dict(run),
        data_fingerprint=data.digest,
        rng=RngRule(seed=run.train.seed, rule=RNG_RULE),
        engine=dict(engine),
        train_state={
            "tokens": state.tokens,
            "data": data.fingerprint,
            "tokenizer": to_dict(data.tokenizer),
            **counters,
        },
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
