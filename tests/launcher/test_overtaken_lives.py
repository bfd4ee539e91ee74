"""A life whose job SLURM has started again, on other nodes, while its script and ranks lived on."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_stand_in import JOB, StandIn
from one_life import events, live

from launcher.life_log import LifeLog

AGAIN = "JobId=100 JobState=RUNNING Requeue=1 Restarts=1 BatchFlag=1\n"
STARTED_AGAIN = f"write('job', {AGAIN!r}); "
CRASH = "save(5); sys.exit(1)"
HOPELESS = "outcome('failed', detail='ConfigError: no data', retry=False); sys.exit(2)"
AWAY = "Unable to contact slurm controller (connect failure)"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def ask_to_stop(slurm: StandIn) -> str:
    return f"open('{slurm.run}/stop', 'w').close(); "


def require_leaves(slurm: StandIn, caplog: pytest.LogCaptureFixture, lines: list[str]) -> None:
    """Nothing may be written, asked for or ended by a life that is no longer the last."""
    caplog.set_level("INFO")
    assert live(slurm) == 85
    assert events(slurm) == lines
    for name in ("scancel", "sbatch"):
        assert slurm.calls(name) == []
    assert {call[0] for call in slurm.calls("scontrol")} <= {"show", "listpids", "--oneliner"}
    assert len([text for text in caplog.messages if "job 100 goes on with this run" in text]) == 1
    for told in ("given up", "come to its end", "ends here"):
        assert not [text for text in caplog.messages if told in text]


@pytest.mark.parametrize("dead", ["", "n2"], ids=["requeue", "resubmit"])
def test_it_does_not_restart_the_run(
    slurm: StandIn, dead: str, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.ranks(STARTED_AGAIN + CRASH)
    slurm.write("dead", dead)
    slurm.write("steps", "100.0\n")
    require_leaves(slurm, caplog, ["started"])


@pytest.mark.parametrize("end", [HOPELESS, "save(10); outcome('done')"], ids=["gives up", "done"])
def test_it_writes_no_end_of_the_run(
    slurm: StandIn, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.ranks(STARTED_AGAIN + end)
    require_leaves(slurm, caplog, ["started"])


@pytest.mark.parametrize("end", [CRASH, "save(5); outcome('resume', 'STOP_FILE')"])
def test_it_leaves_the_stop_file_to_the_later_life(
    slurm: StandIn, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.ranks(STARTED_AGAIN + ask_to_stop(slurm) + end)
    require_leaves(slurm, caplog, ["started"])
    assert (slurm.run / "stop").exists()


@pytest.mark.parametrize("why", ["a stop file", "too many lives", "nothing"])
def test_it_says_nothing_before_its_start(
    slurm: StandIn, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have waited half an hour for the lock of the checkpoints."""
    log = LifeLog(slurm.run)
    for life in range(3 if why == "too many lives" else 0):
        log.append("started", job_id=JOB, life=life)
    before = events(slurm)
    if why == "a stop file":
        (slurm.run / "stop").touch()
    slurm.write("job", AGAIN)
    require_leaves(slurm, caplog, before)
    assert slurm.training() == []
    assert (slurm.run / "stop").exists() == (why == "a stop file")


def test_a_job_that_goes_back_into_the_queue_still_says_how_it_ended(slurm: StandIn) -> None:
    """No later life can have begun, and what this one did must not count as a failure."""
    slurm.ranks(f"{STARTED_AGAIN}write('state', '100|REQUEUED|None\\n'); {CRASH}")
    assert live(slurm) == 85
    assert events(slurm) == ["started", "ended"]


def test_without_an_answer_it_says_how_it_ended_but_keeps_the_stop_file(
    slurm: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    away = f"write('fail-scontrol---oneliner', {AWAY!r}); "
    slurm.ranks(away + ask_to_stop(slurm) + CRASH)
    assert live(slurm) == 85
    assert events(slurm) == ["started", "ended"]
    assert (slurm.run / "stop").exists()
    assert [text for text in caplog.messages if f"{slurm.run / 'stop'} stays" in text]
    # Nor does a job that finds it.
    assert live(slurm) == 85
    assert events(slurm) == ["started", "ended", "stopped"]
    assert (slurm.run / "stop").exists()
    (slurm.folder / "fail-scontrol---oneliner").unlink()
    assert live(slurm) == 85
    assert not (slurm.run / "stop").exists()


def test_without_an_answer_a_run_is_given_up(slurm: StandIn) -> None:
    slurm.ranks(f"write('fail-scontrol---oneliner', {AWAY!r}); {HOPELESS}")
    assert live(slurm) == 1
    assert events(slurm) == ["started", "ended", "gave_up"]
