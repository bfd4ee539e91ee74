"""Every way in which a start of one process ends is on record in its run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_process import prepare_markov, write_run

from mpotrain import launch
from mpotrain.config import RunConfig, load_config
from mpotrain.engine.local import LocalEngine
from mpotrain.errors import AnomalyError, CheckpointError, ParallelError, StorageError
from mpotrain.parallel.ranks import World
from mpotrain.pretrain import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_markov(tmp_path_factory.mktemp("launch") / "data")


def config(folder: Path, data: Path, *overrides: str) -> RunConfig:
    short = ["train.steps=2", "train.eval_every=2", "train.schedule.warmup_steps=1"]
    return load_config(write_run(folder, data), [*short, *overrides])


def outcome(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run" / "outcome.json").read_text())
    content.pop("detail")
    return content


def test_done_and_held(tmp_path: Path, data: Path) -> None:
    assert train(config(tmp_path, data, "train.stop_after=1")) == 0
    expected = {"outcome": "held", "reason": None, "exit_code": 0, "step": 1, "retry": False}
    assert outcome(tmp_path) == expected
    assert train(config(tmp_path, data)) == 0
    assert outcome(tmp_path) == expected | {"outcome": "done", "step": 2}


def test_stopped_on_request(tmp_path: Path, data: Path) -> None:
    assert train(config(tmp_path, data, "train.time_limit_minutes=1e-9")) == 85
    expected = {"outcome": "resume", "reason": "TIME_LIMIT", "exit_code": 85, "step": 0}
    assert outcome(tmp_path) == expected | {"retry": True}
    (tmp_path / "run" / "stop").touch()
    assert train(config(tmp_path, data)) == 85
    assert outcome(tmp_path)["reason"] == "STOP_FILE"


@pytest.mark.parametrize(
    ("error", "exit_code", "retry"),
    [
        (AnomalyError("too many"), 3, False),
        (StorageError("disk full"), 4, True),
        (ValueError("a bug"), 1, True),
    ],
)
def test_failures_in_a_step(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    exit_code: int,
    retry: bool,
) -> None:
    make_step = LocalEngine.step

    def step(self: LocalEngine, *args: Any, **named: Any) -> Any:
        if named["step"] == 1:
            raise error
        return make_step(self, *args, **named)

    monkeypatch.setattr(LocalEngine, "step", step)
    with pytest.raises(type(error)):
        train(config(tmp_path, data))
    expected = {"outcome": "failed", "reason": None, "exit_code": exit_code, "step": 1}
    assert outcome(tmp_path) == expected | {"retry": retry}


def test_refusals(tmp_path: Path, data: Path) -> None:
    """A start that must not begin leaves a record only where a run lies that is not at its end."""
    refused = config(tmp_path, data, "model.hidden_size=64", "model.ffn_size=256", "model.sites={}")
    assert train(config(tmp_path, data, "train.time_limit_minutes=1e-9")) == 85
    with pytest.raises(CheckpointError):
        train(refused)
    expected = {"outcome": "failed", "reason": None, "exit_code": 2, "step": None, "retry": False}
    assert outcome(tmp_path) == expected
    assert train(config(tmp_path, data)) == 0
    with pytest.raises(CheckpointError):
        train(refused)
    assert outcome(tmp_path)["outcome"] == "done"


def test_an_error_of_another_rank_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 2, 0, torch.device("cpu"))
    monkeypatch.setattr(World, "gather_objects", lambda self, mine: [mine, ("disk full", 4)])
    with pytest.raises(ParallelError, match="rank 1 failed: disk full") as caught:
        world.together(lambda: None)
    assert caught.value.exit_code == 4
    assert ParallelError.exit_code == 2


def test_the_watchdog_gets_the_setting(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float | None] = []

    class Seen(launch.Watchdog):
        def __init__(self, timeout: float | None, *args: Any, **named: Any) -> None:
            seen.append(timeout)
            super().__init__(timeout, *args, **named)

    monkeypatch.setattr(launch, "Watchdog", Seen)
    train(config(tmp_path / "a", data, "train.hang_timeout_minutes=3"))
    train(config(tmp_path / "b", data, "train.hang_timeout_minutes=0"))
    assert seen == [180.0, None]


def test_beats_tell_of_every_kind_of_progress(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[tuple[str, int | None]] = []

    class Listening(launch.Watchdog):
        def beat(self, phase: str, step: int | None = None) -> None:
            phases.append((phase, step))
            super().beat(phase, step)

    monkeypatch.setattr(launch, "Watchdog", Listening)
    train(config(tmp_path, data, "train.stop_after=1"))
    train(config(tmp_path, data, "train.spectra_every=1"))
    told = [phase for phase, _ in phases]
    for phase in (
        "meeting the other ranks", "opening the data", "looking for checkpoints",
        "building the model", "building the engine", "step 1", "step 2", "measuring spectra",
        "checkpoint (examined)", "checkpoint (part_written)", "checkpoint (published)", "closing",
        "leaving the other ranks",
    ):  # fmt: skip
        assert phase in told, phase
    num_tensors = 20
    assert told.count("evaluating") >= 4  # 8 sequences, 2 at a time
    assert told.count("reading a checkpoint") > num_tensors
    assert told.count("saving a checkpoint") > 2 * num_tensors
    assert ("between steps", 2) in phases
