"""A job whose run is trained by somebody else already: it leaves, waits, or says who it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from job_stand_in import JOB, StandIn
from one_life import events, last, live

from launcher.life_log import Event, LifeLog
from launcher.rival import LOCK_SECONDS, LOOK_SECONDS, lock_patience
from launcher.writer_lock import holder_of, is_written

HOLDER = (
    "import sys; from pathlib import Path; from mpotrain.checkpoint.lock import FolderLock; "
    "FolderLock(Path(sys.argv[1])).acquire(); print(flush=True); sys.stdin.read()"
)
BOTH = "100|RUNNING|None\n50|{}|None\n"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


@contextmanager
def lock_held(checkpoints: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Let another process hold the lock as ranks do; it goes with the end of its input."""
    checkpoints.mkdir(exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(checkpoints)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def other_job(slurm: StandIn, *told: Event, job_id: str = "50") -> None:
    """Write down what another job has said."""
    for event in told:
        LifeLog(slurm.run).append(event, job_id=job_id, life=0)


@pytest.mark.parametrize(
    "told", [("started",), ("started", "submitted"), ("started", "preflight", "warned")]
)
def test_a_job_leaves_the_run_to_the_one_that_trains_it(
    slurm: StandIn, told: tuple[Event, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="launcher")
    other_job(slurm, *told)
    slurm.write("state", BOTH.format("RUNNING"))
    for name in ("stop", "outcome.json"):
        (slurm.run / name).touch()
    assert live(slurm) == 85
    assert "job 50 goes on with this run" in caplog.text
    # Nothing is taken from the other: its stop file, its outcome, its lives.
    assert (slurm.run / "stop").exists()
    assert (slurm.run / "outcome.json").exists()
    assert events(slurm) == list(told)
    assert slurm.training() == []


@pytest.mark.parametrize(
    ("told", "state"),
    [
        (("started",), "COMPLETING"),
        (("started",), "PENDING"),
        (("started", "ended", "requeued"), "RUNNING"),
        (("submitted",), "RUNNING"),
    ],
)
def test_another_job_that_does_not_train_is_no_hindrance(
    slurm: StandIn, told: tuple[Event, ...], state: str
) -> None:
    other_job(slurm, *told)
    slurm.write("state", BOTH.format(state))
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm) == 0
    assert len(slurm.training()) == 1


def test_the_job_whose_place_it_takes_is_no_rival(slurm: StandIn) -> None:
    other_job(slurm, "started")
    LifeLog(slurm.run).append("resubmitted", job_id="50", life=0, more={"next_job": JOB})
    LifeLog(slurm.run).append("warned", job_id="50", life=0)
    slurm.write("state", BOTH.format("RUNNING"))
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm, continues="50") == 0


def test_a_lock_that_is_given_back_is_waited_for(slurm: StandIn) -> None:
    slurm.ranks("save(10); outcome('done')")
    naps: list[float] = []
    with lock_held(slurm.run / "checkpoints") as process:

        def nap(seconds: float) -> None:
            assert slurm.training() == []
            naps.append(seconds)
            if len(naps) == 3:
                process.kill()
                process.wait()

        assert live(slurm, sleep=nap) == 0
    assert naps == [LOOK_SECONDS] * 3
    assert events(slurm) == ["started", "ended", "done"]


def test_a_job_that_has_waited_for_the_same_lock_may_have_begun(slurm: StandIn) -> None:
    slurm.write("state", BOTH.format("RUNNING"))
    (slurm.run / "outcome.json").touch()
    with lock_held(slurm.run / "checkpoints") as process:

        def nap(seconds: float) -> None:
            other_job(slurm, "started")
            process.kill()
            process.wait()

        assert live(slurm, sleep=nap) == 85
    assert events(slurm) == ["started"]
    assert slurm.training() == []
    assert (slurm.run / "outcome.json").exists()


def test_a_warning_ends_the_waiting_for_the_lock(slurm: StandIn) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    with lock_held(slurm.run / "checkpoints"):
        assert live(slurm, sleep=nap) == 0
    assert len(naps) == 2
    assert slurm.training() == []
    assert events(slurm)[0] == "started"
    assert events(slurm)[-1] == "requeued"


def test_a_stop_file_ends_the_waiting_and_stays_for_the_writer(slurm: StandIn) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        (slurm.run / "stop").touch()

    with lock_held(slurm.run / "checkpoints"):
        assert live(slurm, sleep=nap) == 85
        assert (slurm.run / "stop").exists()
    assert len(naps) == 1
    assert events(slurm) == ["stopped"]
    assert live(slurm) == 85
    assert not (slurm.run / "stop").exists()


def test_a_long_hang_timeout_makes_the_wait_longer() -> None:
    assert lock_patience(20) == LOCK_SECONDS
    assert lock_patience(60) > 3600


def test_a_lock_that_stays_is_named(slurm: StandIn) -> None:
    naps: list[float] = []
    checkpoints = slurm.run / "checkpoints"
    with lock_held(checkpoints) as process:
        assert is_written(checkpoints) is True
        assert live(slurm, sleep=naps.append) == 1
    assert sum(naps) == LOCK_SECONDS
    assert events(slurm) == ["gave_up"]
    for part in (str(checkpoints / ".writer"), f"process {process.pid} on ", "delete that file"):
        assert part in last(slurm, "gave_up")["detail"]
    assert slurm.training() == []


def test_a_lock_without_a_name_has_an_unknown_holder(tmp_path: Path) -> None:
    assert holder_of(tmp_path) == "an unknown process"
    (tmp_path / ".writer").touch()
    assert holder_of(tmp_path) == "an unknown process"
