"""`cancel` and `stop` against a queue in which jobs start, requeue and multiply meanwhile."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from slurm_commands_fake import FakeSlurm, job, make_run, write_lines

from launcher import cancel, cli, stop
from launcher.cancel import Cancellation
from launcher.find_runs import find_runs
from launcher.slurm_queue import SlurmQueue
from mpotrain.errors import ConfigError


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


class Told:
    """Runs a cancellation without waiting; time passes by a second for each pause."""

    def __init__(self, run: Path, *, now: bool = False) -> None:
        self.lines: list[str] = []
        self.seconds = 0.0
        self.ok = Cancellation(
            run,
            SlurmQueue(),
            now,
            say=self.lines.append,
            sleep=self._sleep,
            clock=lambda: self.seconds,
        ).carry_out()
        self.text = "\n".join(self.lines)

    def _sleep(self, seconds: float) -> None:
        self.seconds += seconds


def test_a_waiting_job_is_cancelled_and_leaves_no_stop_file(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "PENDING")
    told = Told(run)
    assert told.ok
    assert slurm.job_state("11") == "CANCELLED"
    assert not (run / "stop").exists()
    # A job that starts before scancel arrives must not be killed.
    assert slurm.calls("scancel") == [["scancel", "--state=PENDING", "11"]]


def test_a_running_job_saves_first(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "RUNNING")
    told = Told(run)
    assert told.ok
    assert slurm.job_state("11") == "RUNNING"
    assert slurm.calls("scancel") == []
    assert "cancel by" in (run / "stop").read_text()
    assert "saves a checkpoint" in told.text


def test_a_running_job_is_killed_now(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11_4")
    slurm.add("11_4", "RUNNING", raw="16")
    slurm.add("11_5", "RUNNING", raw="17")
    assert Told(run, now=True).ok
    assert slurm.job_state("11_4") == "CANCELLED"
    assert slurm.job_state("11_5") == "RUNNING"
    assert not (run / "stop").exists()


def test_a_job_that_starts_between_look_and_cancel_gets_the_stop_file(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "PENDING")
    # The first two looks see it wait; it starts right after the second.
    slurm.set(after={"squeue": [[], [], [{"id": "11", "state": "RUNNING"}]]})
    told = Told(run)
    assert told.ok
    assert slurm.job_state("11") == "RUNNING"
    assert (run / "stop").exists()


@pytest.mark.parametrize("now", [False, True])
def test_a_supervisor_that_requeues_at_the_same_moment_loses(
    tmp_path: Path, slurm: FakeSlurm, now: bool
) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "COMPLETING")
    slurm.set(after={"squeue": [[], [], [], [{"id": "11", "state": "PENDING"}]]})
    told = Told(run, now=now)
    assert told.ok
    assert slurm.job_state("11") == "CANCELLED"
    assert told.seconds > 0
    assert not (run / "stop").exists()


def test_the_stop_file_is_there_before_any_job_is_touched(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "RUNNING")
    seen = []

    def spy(self: SlurmQueue, job_ids: Any, *, waiting_only: bool = False) -> None:
        seen.append((run / "stop").exists())
        real(self, job_ids, waiting_only=waiting_only)

    real = SlurmQueue.cancel
    monkeypatch.setattr(SlurmQueue, "cancel", spy)
    assert Told(run, now=True).ok
    assert seen
    assert all(seen)


def test_a_job_resubmitted_meanwhile_is_found(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "RUNNING")
    # The supervisor has submitted job 12 and was killed before it could write that down.
    unrecorded = job("12", "PENDING", stdout=f"{run}/logs/12.log")
    namesake = job("13", "RUNNING", stdout=f"{tmp_path}/other/logs/13.log")
    slurm.set(after={"scancel": [[unrecorded, namesake]]})
    assert Told(run, now=True).ok
    assert slurm.job_state("12") == "CANCELLED"
    assert slurm.job_state("13") == "RUNNING"


def test_a_recorded_resubmission_is_found(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    resubmitted = {"event": "resubmitted", "job_id": "11", "next_job": "12"}
    write_lines(run / "launch" / "lives.jsonl", [resubmitted])
    slurm.add("12", "RUNNING")
    assert Told(run, now=True).ok
    assert slurm.job_state("12") == "CANCELLED"


def test_chained_jobs_go_first(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "RUNNING")
    slurm.add("12", "PENDING", dependency="afterok:11(unfulfilled)", name="tune")
    slurm.add("13", "PENDING", dependency="aftercorr:12(unfulfilled)", name="export")
    slurm.add("14", "PENDING", dependency="afterok:99(unfulfilled)", name="foreign")
    told = Told(run, now=True)
    assert told.ok
    assert [slurm.job_state(i) for i in ("11", "12", "13", "14")] == ["CANCELLED"] * 3 + ["PENDING"]
    assert slurm.calls("scancel")[0] == ["scancel", "--state=PENDING", "12", "13"]
    assert "job 13 waits for the good end of this run: cancelled" in told.text


@pytest.mark.parametrize(
    "dependency",
    [
        "afterany:11(unfulfilled)",
        "afternotok:11(unfulfilled)",
        "after:11+5(unfulfilled)",
        "afterok:99(unfulfilled),afterany:11(unfulfilled)",
        "afterok:11(unfulfilled)?afterok:99(unfulfilled)",
    ],
)
def test_a_job_that_can_start_after_a_cancel_stays(
    tmp_path: Path, slurm: FakeSlurm, dependency: str
) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "RUNNING")
    slurm.add("12", "PENDING", dependency=dependency, name="export")
    assert Told(run, now=True).ok
    assert slurm.job_state("11") == "CANCELLED"
    assert slurm.job_state("12") == "PENDING"


def test_a_job_that_does_not_leave_is_reported(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "SETTLE_SECONDS", 12.0)
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "RUNNING")
    slurm.set(cancelled_becomes="COMPLETING")
    told = Told(run, now=True)
    assert not told.ok
    assert "11 is COMPLETING" in told.text
    assert 12 <= told.seconds < 12 + cancel.MAX_POLL_SECONDS
    assert (run / "stop").exists()


def test_slurm_that_refuses_or_does_not_answer_is_said_so(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "RUNNING")
    slurm.set(trouble={"scancel": "scancel: error: Access/permission denied"})
    told = Told(run, now=True)
    assert not told.ok
    assert "permission denied" in told.text
    (run / "stop").unlink()
    slurm.set(trouble={"squeue": "slurm_load_jobs error: Unable to contact"})
    told = Told(run, now=True)
    assert not told.ok
    assert (run / "stop").exists()
    assert slurm.job_state("11") == "CANCELLED"
    assert "Unable to contact" in told.text


def test_nothing_to_cancel_leaves_nothing_behind(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11", outcome={"outcome": "done"})
    told = Told(run)
    assert told.ok
    assert "is done; nothing to cancel" in told.text
    assert not (run / "stop").exists()
    assert slurm.calls("scancel") == []


def test_the_command_takes_several_runs_and_whole_folders(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "sweep"
    for number in ("11", "12"):
        make_run(root / number, job_id=number)
        slurm.add(number, "PENDING")
    parser = argparse.ArgumentParser()
    cancel.add_arguments(parser)
    with pytest.raises(ConfigError, match="holds 2"):
        cancel.main(parser.parse_args([str(root)]))
    assert cancel.main(parser.parse_args([str(root), "--recursive"])) == 0
    assert {slurm.job_state("11"), slurm.job_state("12")} == {"CANCELLED"}
    assert capsys.readouterr().out.splitlines() == [
        f"{root / number}: job {number} cancelled" for number in ("11", "12")
    ]
    slurm.set(trouble={"squeue": "down"})
    assert cancel.main(parser.parse_args([str(root / "11")])) == 1


def test_a_folder_without_runs_is_said_so_before_anything_is_cancelled(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "sweep" / "a", job_id="11")
    slurm.add("11", "PENDING")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.main(["cancel", "--recursive", str(tmp_path / "sweep"), str(empty)]) == 2
    assert f"{empty}: holds no run; nothing to cancel" in capsys.readouterr().err
    assert slurm.job_state("11") == "PENDING"
    assert not (run / "stop").exists()


def test_folders_that_cannot_be_searched_may_hold_jobs(
    tmp_path: Path,
    slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in ("11", "12"):
        make_run(tmp_path / "sweep" / number, job_id=number)
        slurm.add(number, "PENDING")
    monkeypatch.setattr(cancel, "find_runs", partial(find_runs, max_folders=2))
    assert cli.main(["cancel", "--recursive", str(tmp_path / "sweep")]) == 1
    assert "the search stopped after 2 folders" in capsys.readouterr().out
    assert [slurm.job_state("11"), slurm.job_state("12")] == ["CANCELLED", "PENDING"]


def test_a_run_whose_jobs_cannot_be_read_is_not_called_cancelled(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    (run / "launch" / "submission.json").write_text("{")
    slurm.add("11", "RUNNING")
    told = Told(run)
    assert not told.ok
    assert "submission.json: is no JSON object" in told.text
    assert "look for them with squeue" in told.text
    assert (run / "stop").exists()


def stop_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    stop.add_arguments(parser)
    return stop.main(parser.parse_args(arguments))


def test_stop_writes_the_file_and_takes_it_back(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    file = tmp_path / "run.toml"
    file.write_text(f"folder = {json.dumps(str(run))}\n")
    slurm.add("11", "RUNNING")
    assert stop_command(str(file)) == 0
    assert (run / "stop").read_text().startswith("stop by ")
    assert sorted(path.name for path in run.iterdir()) == ["launch", "stop"]
    assert stop_command("--undo", str(run)) == 0
    assert not (run / "stop").exists()
    assert "goes on" in capsys.readouterr().out


def test_stop_says_one_thing_of_each_of_several_runs(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / f"run{number}", job_id=str(number)) for number in range(5)]
    for number, state in enumerate(["RUNNING", "PENDING", "STOPPED", "COMPLETED"]):
        slurm.add(str(number), state)
    (runs[3] / "outcome.json").write_text('{"outcome": "done"}')
    (runs[4] / "launch" / "submission.json").write_text("{")
    assert stop_command(*map(str, runs)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(run) for run in runs]
    saves = "saves a checkpoint after the step it is at, and ends"
    for line, part in zip(
        lines,
        [
            f": {saves}",
            "is queued now: it stops as soon as it runs",
            "is suspended now: it stops as soon as it runs",
            "is done already; nothing to stop",
            f"if it runs, it {saves}. Whether it does is unknown: launch/submission.json",
        ],
        strict=True,
    ):
        assert part in line
        assert (saves in line) == (saves in part)
    assert [(run / "stop").exists() for run in runs] == [True, True, True, False, True]
    assert len(slurm.calls("squeue")) == 1
    assert stop_command("--undo", *map(str, runs)) == 0
    assert not [run for run in runs if (run / "stop").exists()]


def test_stop_does_not_lie_in_wait_for_the_next_start(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", job_id="11", outcome={"outcome": "resume"})
    assert stop_command(str(run)) == 0
    assert not (run / "stop").exists()
    assert "is stopped already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no run folder"):
        stop_command(str(tmp_path / "bin"))
    del slurm
