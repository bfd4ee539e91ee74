"""What a run leaves beside checkpoints and metrics: configuration, surroundings, outcome.

The environment is recorded by allow-list: versions, devices, git state. Environment variables,
which may hold secrets, are never written.
"""

from __future__ import annotations

import json
import platform
import subprocess
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
from mpotrain.schema import to_dict
from mpotrain.train.state import RunState

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the run folder."""
RNG_RULE = "splitmix64(seed, step, microbatch)"
CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "environment.jsonl"
OUTCOME_FILE = "outcome.json"


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


def record_outcome(folder: Path, outcome: str, detail: str) -> None:
    """Write how this start ended: `done`, `resume` or `failed`.

    A batch script reads this file; exit codes of many ranks are no reliable message.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"outcome": outcome, "detail": detail}
        write_durably(folder / OUTCOME_FILE, (json.dumps(content) + "\n").encode())
    except OSError as error:
        raise StorageError(f"{folder / OUTCOME_FILE}: cannot be written ({error})") from error


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


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and whether files differ from it; None outside of a git work tree."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": git("status", "--porcelain", "--untracked-files=no").splitlines(),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
