"""One rank dies: the others end by themselves, and the run goes on from its last checkpoint."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from launched_ranks import still_alive, wait_for_workers, workers
from run_process import curve, prepare_markov, start, train, wait_for_step, write_run

ENGINE = "engine={kind='deepspeed', zero_stage=1}"
STEPS = "train.steps=40"
"""Enough of them for a busy machine to kill a rank before the last."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tokens."""
    return prepare_markov(tmp_path_factory.mktemp("tokens") / "data")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[tuple[Any, ...]]:
    """The curve of a run whose ranks all live."""
    folder = tmp_path_factory.mktemp("straight")
    train(write_run(folder, data), ENGINE, STEPS, launcher="torchrun", world=2)
    return curve(folder / "run")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_start_and_the_next_goes_on(
    killed: int, tmp_path: Path, data: Path, straight: list[tuple[Any, ...]]
) -> None:
    run, folder = write_run(tmp_path, data), tmp_path / "run"
    process = start(run, ENGINE, STEPS, launcher="torchrun", world=2)
    ranks = wait_for_workers(process, 2)
    wait_for_step(folder, 6, process)
    survivor = ranks[1 - killed]
    ranks[killed].send_signal(signal.SIGKILL)
    output = process.communicate(timeout=240)[0]
    outcome = folder / "outcome.json"
    if outcome.exists() and json.loads(outcome.read_text())["outcome"] == "done":
        pytest.skip("the run was over before the rank was killed")
    assert process.returncode != 0, output
    assert still_alive([survivor]) == []
    if killed == 1 and outcome.exists():
        assert json.loads(outcome.read_text())["outcome"] == "resume", output
    train(run, ENGINE, STEPS, launcher="torchrun", world=2)
    assert curve(folder) == straight


def test_orphans_of_a_killed_launcher_save_and_leave(tmp_path: Path, data: Path) -> None:
    run = write_run(tmp_path, data)
    folder = tmp_path / "run"
    process = start(run, ENGINE, "train.steps=4000", launcher="torchrun", world=2)
    wait_for_step(folder, 3, process)
    ranks = workers(process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert still_alive(list(ranks.values())) == []
    assert json.loads((folder / "outcome.json").read_text())["outcome"] == "resume"
    step = curve(folder)[-1][0]
    assert (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
