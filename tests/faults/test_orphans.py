"""The deepspeed launcher dies in every way that it knows: its ranks save, and none stays behind."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from launched_ranks import still_alive, wait_for_workers, workers
from run_process import curve, prepare_markov, start, wait_for_step, write_run

ENGINE = "engine={kind='deepspeed', zero_stage=1}"


def node_launcher(command: subprocess.Popen[str]) -> psutil.Process:
    """Return the process between the `deepspeed` command and its ranks."""
    (child,) = psutil.Process(command.pid).children()
    return child


def everything(command: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(command.pid).children(recursive=True)


def wait_for_torch(rank: psutil.Process) -> None:
    """Wait until a rank imports torch; the command line has noted its launcher by then."""
    end = time.monotonic() + 120
    while not any("torch" in entry.path for entry in rank.memory_maps()):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("target", "number", "reasons"),
    [
        ("command", signal.SIGTERM, {"LAUNCHER_DIED"}),
        ("command", signal.SIGUSR1, {"LAUNCHER_DIED"}),
        ("node", signal.SIGUSR1, {"LAUNCHER_DIED"}),
        ("node", signal.SIGTERM, {"SIGTERM", "LAUNCHER_DIED"}),
    ],
)
def test_ranks_save_when_their_launcher_dies(
    target: str, number: signal.Signals, reasons: set[str], tmp_path: Path
) -> None:
    run = write_run(tmp_path, prepare_markov(tmp_path / "data"))
    folder = tmp_path / "run"
    process = start(run, ENGINE, "train.steps=100000", launcher="deepspeed", world=2)
    wait_for_step(folder, 3, process)
    family = everything(process)
    if target == "command":
        process.send_signal(number)
    else:
        node_launcher(process).send_signal(number)
    assert still_alive(family) == []
    output = process.communicate(timeout=120)[0]
    outcome = json.loads((folder / "outcome.json").read_text())
    step = curve(folder)[-1][0]
    assert (outcome["outcome"], outcome["step"]) == ("resume", step), output
    assert outcome["reason"] in reasons
    assert (outcome["exit_code"], outcome["retry"]) == (85, True)
    assert (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()


def test_ranks_whose_launcher_dies_before_they_have_met_do_not_train(tmp_path: Path) -> None:
    """The launcher is gone while the ranks still import: they must know it all the same."""
    run = write_run(tmp_path, prepare_markov(tmp_path / "data"))
    process = start(run, ENGINE, "train.steps=100000", launcher="deepspeed", world=2)
    for rank in wait_for_workers(process, 2).values():
        wait_for_torch(rank)
    family = everything(process)
    process.kill()
    assert still_alive(family) == []
    process.communicate(timeout=120)
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["reason"], outcome["step"]) == ("LAUNCHER_DIED", 0)


def test_the_last_rank_of_a_dead_launcher_does_not_stay(tmp_path: Path) -> None:
    run = write_run(tmp_path, prepare_markov(tmp_path / "data"))
    folder = tmp_path / "run"
    process = start(run, ENGINE, "train.steps=100000", launcher="deepspeed", world=2)
    wait_for_step(folder, 3, process)
    family, ranks = everything(process), workers(process)
    ranks[1].suspend()  # or both might agree to stop before it dies
    for victim in (psutil.Process(process.pid), node_launcher(process), ranks[1]):
        victim.send_signal(signal.SIGKILL)
    assert still_alive(family) == []
    process.communicate(timeout=120)
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["outcome"] == "resume"
    assert (outcome["reason"], outcome["exit_code"]) == ("LOST_RANK", 1)
    assert outcome["retry"] is True
