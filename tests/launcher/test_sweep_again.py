"""A sweep that is given again with other settings, or beside runs that SLURM knows nothing of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_commands_fake import FakeSlurm
from sweep_cases import CHAINED, GRID, command, end, slurm

from mpotrain.config import load_config
from mpotrain.errors import ConfigError, MpotrainError

__all__ = ["slurm"]

LONGER = GRID.replace("train.steps = 60", "train.steps = 70")
FIRST = Path("runs/sweep/lr-0.001-seed-1")


def test_changed_settings_are_not_taken_for_the_same_run(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    command(GRID)
    with pytest.raises(ConfigError, match=r"train\.steps: 60 -> 70") as caught:
        command(LONGER)
    assert len(caught.value.problems) == 4
    for job_id in ("500", "501", "502", "503"):
        slurm.update(job_id, state="FAILED")
    assert command(LONGER, "--update") == 0
    assert "4 of 4 runs submitted" in capsys.readouterr().out
    assert load_config(FIRST / "launch/run.toml").train.steps == 70


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ([], ["train.stop_after=30"], r"train\.stop_after: None -> 30"),
        (["train.stop_after=30"], [], r"train\.stop_after: 30 -> None"),
    ],
)
def test_a_setting_that_is_left_open_is_another_setting(
    slurm: FakeSlurm, before: list[str], after: list[str], told: str
) -> None:
    command(GRID, *before)
    with pytest.raises(ConfigError, match=told):
        command(GRID, *after)
    del slurm


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_job_keeps_its_settings(slurm: FakeSlurm, state: str) -> None:
    command(GRID)
    for job_id in ("500", "501", "502"):
        slurm.update(job_id, state="FAILED")
    slurm.update("503", state=state)
    with pytest.raises(ConfigError) as caught:
        command(LONGER, "--update")
    word = {"PENDING": "queued", "RUNNING": "running"}[state]
    folder = Path.cwd() / "runs/sweep/lr-0.0003-seed-2"
    (problem,) = caught.value.problems
    assert problem.startswith(f"{folder}: is {word} with other settings (train.steps: 60 -> 70)")
    assert f"python -m launcher cancel {folder})" in problem
    assert len(slurm.calls("sbatch")) == 4


def test_a_finished_run_is_trained_further(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    command(CHAINED)
    for job_id in range(500, 507):
        slurm.update(str(job_id), state="COMPLETED")
    for folder in Path("runs/sweep").glob("*/*"):
        end(folder)
    capsys.readouterr()
    plain = Path("runs/sweep/plain")
    steps = load_config(plain / "seed-1/launch/run.toml").train.steps
    assert command(CHAINED, f"train.log_every={steps}", "--update") == 0
    out = capsys.readouterr().out
    assert "seed-1: done, skipped; its settings stay (train.log_every: " in out
    assert "0 of 7 runs submitted" in out
    longer = CHAINED.replace(
        "train.seed = [1, 2]", f"train.seed = [1, 2]\ntrain.steps = [{steps + 9}]"
    )
    longer = longer.replace(
        "[stages.plain.grid]", 'name = "seed-{train.seed}"\n[stages.plain.grid]'
    )
    (Path("runs/sweep/tuned/seed-1_seed-5") / "outcome.json").unlink()
    assert command(longer, "--update") == 0
    out = capsys.readouterr().out
    assert "plain/seed-1: job 507, goes on (done before)" in out
    assert "tuned/seed-1_seed-6: done, skipped" in out
    # What is still to be done waits for the longer run.
    assert "tuned/seed-1_seed-5: job 509, waits for 507" in out
    assert "3 of 7 runs submitted" in out


def test_a_run_that_was_held_goes_on(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    command(GRID, "train.stop_after=30")
    slurm.update("500", state="COMPLETED")
    (FIRST / "outcome.json").write_text('{"outcome": "held", "step": 30}')
    assert command(GRID, "train.stop_after=30") == 0
    assert "seed-1: held, skipped" in capsys.readouterr().out
    for job_id in ("501", "502", "503"):
        slurm.update(job_id, state="FAILED")
    assert command(GRID, "train.stop_after=40", "--update") == 0
    assert "seed-1: job 504, goes on (held before)" in capsys.readouterr().out


@pytest.fixture
def trained_by_hand(slurm: FakeSlurm) -> Iterator[Path]:
    """A run of the first stage that a process of this machine trains without SLURM."""
    folder = Path("runs/sweep/plain/seed-1")
    (folder / "checkpoints").mkdir(parents=True)
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "checkpoints" / ".writer")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield folder
        process.communicate()
    del slurm


@pytest.mark.parametrize("arguments", [[], ["--array"], ["--dry-run"]], ids=str)
def test_nothing_starts_beside_a_parent_that_trains_outside_of_the_queue(
    slurm: FakeSlurm, trained_by_hand: Path, arguments: list[str]
) -> None:
    with pytest.raises(MpotrainError) as caught:
        command(CHAINED, *arguments)
    told, folder = str(caught.value), Path.cwd() / trained_by_hand
    assert f"must wait for {folder}, which is running outside of the queue" in told
    assert f"(python -m launcher stop {folder})" in told
    assert "(2 more like that)" in told
    assert slurm.calls("sbatch") == []


def test_notes_of_the_plans_stand_once(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("cluster.toml").write_text(f"{Path('cluster.toml').read_text()}gpus_per_node = 2\n")
    assert command(GRID, "--dry-run") == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "which would have nothing to do" in line]
    assert line.startswith("note: engine.device: ")
    assert line.endswith(" (in all 4 runs)")
    command(GRID)
    capsys.readouterr()
    assert command(GRID) == 0  # nothing is submitted
    assert "note: " not in capsys.readouterr().out
    del slurm
