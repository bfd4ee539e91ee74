"""Queued runs of a sweep behind a run that is submitted once more: they wait for it again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from slurm_commands_fake import FakeSlurm
from sweep_cases import CHAINED, command, end, slurm

from launcher.life_log import LifeLog
from launcher.run_reader import read_run
from mpotrain.errors import MpotrainError

__all__ = ["slurm"]

SWEEP = f'{CHAINED}[stages.last]\nrun = "run.toml"\nafter = "tuned"\n'
PLAIN = "train.seed = [1, 2]\n[stages.plain.fixed]\ntrain.steps = {}\n"
SHORT, LONG = (SWEEP.replace("train.seed = [1, 2]\n", PLAIN.format(n)) for n in (60, 70))
FOLDERS = {
    "500": "plain/seed-1",
    "501": "plain/seed-2",
    "502": "report/report",
    "503": "tuned/seed-1_seed-5",
    "504": "tuned/seed-1_seed-6",
    "505": "tuned/seed-2_seed-5",
    "506": "tuned/seed-2_seed-6",
    "507": "last/last",
}


def folder_of(job_id: str) -> Path:
    return Path("runs/sweep") / FOLDERS[job_id]


@pytest.fixture
def done(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> FakeSlurm:
    """The first stage has ended well, and all that follow it still wait for nodes."""
    assert command(SHORT) == 0
    assert {job: read_run(folder_of(job)).job_ids for job in FOLDERS} == {
        job: (job,) for job in FOLDERS
    }
    for job in ("500", "501"):
        slurm.update(job, state="COMPLETED")
        end(folder_of(job))
    capsys.readouterr()
    return slurm


def waiting(slurm: FakeSlurm) -> dict[str, str]:
    return {
        job["id"]: job["dependency"] for job in slurm.state["jobs"] if job["state"] == "PENDING"
    }


def require_unchanged(slurm: FakeSlurm, num_jobs: int = 8) -> None:
    assert slurm.calls("scancel") == []
    assert sum("--test-only" not in call for call in slurm.calls("sbatch")) == num_jobs


def test_they_wait_for_a_run_that_is_trained_further(
    done: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(LONG, "--update") == 0
    assert waiting(done) == {
        "508": "(null)",
        "509": "(null)",
        "510": "afterok:508:509",
        "511": "afterok:508",
        "512": "afterok:508",
        "513": "afterok:509",
        "514": "afterok:509",
        "515": "afterok:511:512:513:514",
    }
    # Those at the end first, and all of them before anything is submitted.
    assert done.calls("scancel") == [
        ["scancel", "--state=PENDING", "507", "506", "505", "504", "503", "502"]
    ]
    called = [call[0] for call in done.state["calls"]]
    assert "scancel" not in called[called.index("scancel") + 1 :]
    assert called[called.index("scancel") :].count("sbatch") == 8
    # What `status` explains a job by that SLURM throws out.
    assert read_run(folder_of("503")).waits_for == ("508",)
    out = capsys.readouterr().out
    assert "seed-1_seed-5: job 511, waits for 508, in place of job 503" in out
    assert "8 of 8 runs submitted" in out
    # Nothing is left to do.
    assert command(LONG, "--update") == 0
    assert len(done.calls("sbatch")) == 16
    assert len(done.calls("scancel")) == 1


def test_those_behind_other_runs_keep_their_jobs(slurm: FakeSlurm) -> None:
    assert command(SHORT) == 0
    # SLURM takes a moment to throw out what waits for a job that has failed.
    slurm.update("500", state="FAILED")
    slurm.update("501", state="RUNNING")
    assert command(SHORT) == 0
    assert waiting(slurm) == {
        "505": "afterok:501",
        "506": "afterok:501",
        "508": "(null)",
        "509": "afterok:508:501",
        "510": "afterok:508",
        "511": "afterok:508",
        "512": "afterok:510:511:505:506",
    }


def test_arrays_wait_too(slurm: FakeSlurm) -> None:
    assert command(SHORT, "--array") == 0
    for task in (0, 1):
        slurm.update(f"500_{task}", state="COMPLETED")
        end(Path(f"runs/sweep/plain/seed-{task + 1}"))
    before = waiting(slurm)
    assert command(LONG, "--update", "--array") == 0
    after = waiting(slurm)
    assert not before.keys() & after.keys()
    assert len(after) == len(before) + 2
    (array,) = {job.partition("_")[0] for job, waits in after.items() if waits == "(null)"}
    assert sorted(waits for waits in after.values() if array in waits) == [
        *[f"afterok:{array}_0"] * 2, f"afterok:{array}_0:{array}_1", *[f"afterok:{array}_1"] * 2,
    ]  # fmt: skip


def test_a_dry_run_takes_nothing_out(done: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(LONG, "--update", "--dry-run") == 0
    require_unchanged(done)
    assert "waits for JOB-OF-seed-1, in place of job 503" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["runs", "was requeued", "has a new job"])
def test_a_run_that_has_begun_is_left_alone_and_so_is_its_parent(done: FakeSlurm, how: str) -> None:
    child, log = Path.cwd() / folder_of("503"), LifeLog(folder_of("503"))
    if how == "runs":
        done.update("503", state="RUNNING")
    else:
        log.append("started", job_id="503", life=0)
    if how == "has a new job":
        log.append("resubmitted", job_id="503", life=0, more={"next_job": "600"})
        done.update("503", state="FAILED")
        done.add("600", "PENDING")
    for arguments in ([], ["--dry-run"]):
        with pytest.raises(MpotrainError) as caught:
            command(LONG, "--update", *arguments)
        word = "running" if how == "runs" else "queued"
        assert f"{child}: is {word} and has begun behind " in str(caught.value)
        assert f"python -m launcher cancel {child}" in str(caught.value)
    require_unchanged(done)


def test_an_earlier_job_of_a_queued_run_does_not_matter(done: FakeSlurm) -> None:
    log = LifeLog(folder_of("503"))
    done.update("503", state="FAILED")
    log.append("started", job_id="503", life=0)
    assert command(SHORT) == 0  # a job of its own, behind a run that is done
    assert waiting(done)["508"] == "(null)"
    assert command(LONG, "--update") == 0
    assert read_run(folder_of("503")).waits_for == ("510",)
    assert done.job_state("508") == "CANCELLED"


def test_jobs_of_others_that_would_be_thrown_out_are_named(done: FakeSlurm) -> None:
    done.add("700", "PENDING", dependency="afterok:502(unfulfilled)")
    done.add("701", "PENDING", dependency="afterany:502(unfulfilled)")
    with pytest.raises(MpotrainError, match=r"but job 700, of no run of this sweep, waits for it"):
        command(LONG, "--update")
    require_unchanged(done)
    done.update("700", state="CANCELLED")
    assert command(LONG, "--update") == 0


def test_a_run_that_begins_in_this_moment_stops_the_submission(done: FakeSlurm) -> None:
    # The queue is read twice before anything is taken out.
    done.set(after={"squeue": [[], [{"id": "504", "state": "RUNNING"}]]})
    with pytest.raises(MpotrainError, match=r"job 504 has begun to run in this moment"):
        command(LONG, "--update")
    assert len(done.calls("sbatch")) == 8
    assert list(waiting(done)) == []
    done.update("504", state="COMPLETED")
    end(folder_of("504"))
    assert command(LONG, "--update") == 0
    assert waiting(done)["510"] == "afterok:508:509"


def test_a_queue_that_keeps_the_jobs_stops_the_submission(
    done: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.sweep_children.LEAVE_SECONDS", -1.0)
    done.set(cancelled_becomes="COMPLETING")
    with pytest.raises(MpotrainError, match=r"job 50\d, .* stays; nothing was submitted"):
        command(LONG, "--update")
    assert len(done.calls("sbatch")) == 8


def test_jobs_that_leave_slowly_are_waited_for(
    done: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.sweep_children.POLL_SECONDS", 0.0)
    gone = [{"id": job, "state": "CANCELLED"} for job in FOLDERS if int(job) > 501]
    done.set(cancelled_becomes="COMPLETING", after={"squeue": [[], [], [], gone]})
    assert command(LONG, "--update") == 0
    assert len(done.calls("sbatch")) == 16


def test_what_could_not_be_submitted_is_submitted_by_the_same_command(done: FakeSlurm) -> None:
    done.set(sbatch_left=1)
    with pytest.raises(MpotrainError, match="QOSMax"):
        command(LONG, "--update")
    assert waiting(done) == {"508": "(null)"}
    done.set(sbatch_left=-1)
    assert command(LONG, "--update") == 0
    assert [waits for waits in waiting(done).values() if re.search(r":508\b", waits)]
    assert len(waiting(done)) == 8
