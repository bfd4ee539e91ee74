"""Run folders on a disk that fails: no life is lost for a line of a log, and none is forgotten."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_stand_in import JOB, StandIn
from one_life import events, last, live, signal_later

from launcher import journal as journal_module
from launcher.batch import await_files
from launcher.life_history import history_of
from launcher.life_log import LifeLog, Record
from launcher.run_reader import read_run
from launcher.sweep_array import ArrayTask, write_index
from mpotrain.errors import StorageError

ROOT = Path(__file__).resolve().parents[2]
Naps = list[float]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def fail(monkeypatch: pytest.MonkeyPatch, name: str, fails: Callable[[int], bool]) -> None:
    """Let calls of a method of `LifeLog` fail, by their number."""
    calls: list[int] = []
    real = getattr(LifeLog, name)

    def method(self: LifeLog, *arguments: Any, **named: Any) -> Any:
        calls.append(len(calls))
        if fails(calls[-1]):
            raise StorageError(f"{self.path}: {os.strerror(errno.ESTALE)}")
        return real(self, *arguments, **named)

    monkeypatch.setattr(LifeLog, name, method)


def counting(naps: Naps) -> Callable[[float], None]:
    """Return a sleep that only notes how long."""
    return naps.append


def test_lines_that_cannot_be_written_wait_for_the_next(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "append", lambda number: number < 3)
    slurm.ranks("save(5); outcome('resume', 'SIGTERM')")
    naps: Naps = []
    assert live(slurm, sleep=counting(naps)) == 0
    assert events(slurm) == ["started", "ended", "requeued"]
    assert naps == [5.0, 5.0]
    times = [record["time"] for record in LifeLog(slurm.run).records()]
    assert times == sorted(times)
    assert last(slurm, "started")["step"] is None  # as it was then


def test_a_life_with_progress_goes_on_without_a_record(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "append", lambda number: True)
    slurm.ranks("save(5); sys.exit(1)")
    naps: Naps = []
    assert live(slurm, sleep=counting(naps)) == 0
    assert ["requeue", JOB] in slurm.calls("scontrol")
    assert len(naps) == 2  # at the start alone


def test_the_line_that_names_a_new_job_is_tried_again(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new job waits for it, and would leave the run to this one."""
    fail(monkeypatch, "append", lambda number: 2 <= number < 5)
    slurm.write("dead", "n2")
    slurm.ranks("save(5); sys.exit(1)")
    naps: Naps = []
    assert live(slurm, sleep=counting(naps)) == 85
    assert events(slurm) == ["started", "ended", "resubmitted"]
    assert last(slurm, "resubmitted")["next_job"] == "101"
    assert naps == [5.0, 5.0]


def test_a_failed_life_that_cannot_be_counted_is_the_last(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail(monkeypatch, "append", lambda number: True)
    slurm.ranks("sys.exit(1)")
    naps: Naps = []
    assert live(slurm, sleep=counting(naps)) == 1
    assert ["requeue", JOB] not in slurm.calls("scontrol")
    assert sum(naps) > 590  # ten minutes, as for a controller that is away
    for part in ("lives.jsonl cannot be written", "nobody would count it", "given up"):
        assert part in caplog.text


def test_a_failed_life_waits_until_it_can_be_counted(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "append", lambda number: number < 30)
    slurm.ranks("sys.exit(1)")
    assert [live(slurm, sleep=lambda seconds: None) for _ in range(3)] == [0, 0, 1]
    assert "3 failed lives" in last(slurm, "gave_up")["detail"]


def test_a_life_whose_time_is_over_does_not_wait(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "append", lambda number: True)
    slurm.ranks("write('up'); until('signal-USR1'); sys.exit(1)")
    thread = signal_later(slurm, signal.SIGUSR1, "up")
    naps: Naps = []
    assert live(slurm, sleep=counting(naps)) == 1
    thread.join()
    assert len(naps) == 2


def test_a_life_that_had_to_make_room_needs_no_count(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "append", lambda number: True)
    slurm.ranks("outcome('resume', 'SIGTERM')")
    naps: Naps = []
    assert live(slurm, sleep=counting(naps)) == 0
    assert len(naps) == 2


def test_a_line_that_is_there_twice_counts_once() -> None:
    # The disk may fail behind the line: it is written again.
    started: Record = {"event": "started", "job_id": "7", "life": 0, "step": 5}
    history = history_of([started, started], "7", continues=None, restart_count=0, step=5)
    assert (history.life, history.num_lives, history.fruitless) == (1, 2, 1)


def test_status_counts_a_life_once_that_is_there_twice(tmp_path: Path) -> None:
    for life in (0, 0, 1):
        LifeLog(tmp_path).append("started", job_id=JOB, life=life)
    assert read_run(tmp_path).num_starts == 2


def test_lines_that_cannot_be_read_for_a_while_are_waited_for(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.ranks("sys.exit(1)")
    assert [live(slurm) for _ in range(2)] == [0, 0]
    with monkeypatch.context() as patch:
        fail(patch, "records", lambda number: number < 7)
        naps: Naps = []
        assert live(slurm, sleep=counting(naps)) == 1
    assert len(naps) == 7
    assert "3 failed lives" in last(slurm, "gave_up")["detail"]


def test_nothing_is_started_where_earlier_lives_cannot_be_read(slurm: StandIn) -> None:
    (slurm.run / "launch").write_text("in the way")
    naps: Naps = []
    with pytest.raises(StorageError, match=r"lives\.jsonl: cannot be read"):
        live(slurm, sleep=counting(naps))
    assert sum(naps) > 590
    assert slurm.training() == []


def refuse(folder: Path) -> None:
    raise StorageError(f"{folder / 'outcome.json'}: {os.strerror(errno.EIO)}")


def test_an_old_outcome_that_cannot_be_deleted_is_passed_over(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "forget_outcome", refuse)
    (slurm.run / "outcome.json").write_text('{"outcome": "failed", "retry": false}')
    slurm.ranks("sys.exit(1)")
    assert live(slurm, sleep=lambda seconds: None) == 0
    assert last(slurm, "ended")["outcome"] is None
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm, sleep=lambda seconds: None) == 0
    assert last(slurm, "ended")["outcome"] == "done"


def test_where_nothing_is_known_of_the_old_outcome_none_is_believed(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "forget_outcome", refuse)
    slurm.ranks("outcome('failed', retry=False); sys.exit(2)")
    assert live(slurm, sleep=lambda seconds: None) == 0
    assert last(slurm, "ended")["outcome"] is None


def test_a_stop_file_that_cannot_be_looked_for_stops_nothing(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.exists

    def exists(path: Path) -> bool:
        if path.name == "stop":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path)

    monkeypatch.setattr(Path, "exists", exists)
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm) == 0
    assert events(slurm) == ["started", "ended", "done"]


def test_files_of_a_later_life_are_waited_for(tmp_path: Path) -> None:
    late, there = tmp_path / "run.toml", tmp_path / "cluster.toml"
    there.touch()
    naps: Naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            late.touch()

    await_files([there, late], sleep=sleep)
    assert naps == [5.0] * 3
    naps.clear()
    await_files([tmp_path / "never"], attempts=4, sleep=counting(naps))
    assert len(naps) == 3  # whoever reads it then says what is wrong


ARRAY_TASK = """
import os, sys
from functools import partial
from pathlib import Path
from launcher import array_task
folder = Path(sys.argv[1])
late = [folder / "late-index.json", folder / "blocked"]
def sleep(seconds):
    path = late.pop(0)
    path.rename(folder / "index.json") if path.suffix else path.unlink()
array_task.await_files = partial(array_task.await_files, sleep=sleep)
array_task.write_to = partial(array_task.write_to, sleep=sleep)
os.execv = lambda path, argv: print("becomes", *argv[3:5])
array_task.main([str(folder / "index.json")])
"""


@pytest.mark.parametrize("count", [0, 1])
def test_an_array_task_of_a_later_life_waits_for_its_files(tmp_path: Path, count: int) -> None:
    """First the index is not there, then the run folder."""
    run = tmp_path / "blocked" / "run"
    write_index(tmp_path / "late-index.json", [ArrayTask(run, "train")])
    (tmp_path / "blocked").touch()
    done = subprocess.run(
        [sys.executable, "-c", ARRAY_TASK, str(tmp_path)],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "SLURM_RESTART_COUNT": str(count),
            "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "0",
        },
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if count == 0:
        assert (done.returncode, run.exists()) == (2, False)
        assert "index.json: cannot be read" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        log = (run / "logs" / "70_0.log").read_text()
        assert log == f"becomes batch {run}/launch/run.toml\n"


BATCH = """
import os, sys
from pathlib import Path
from launcher import batch
class Over:
    def __init__(self, *_):
        pass
    def run(self):
        return 0
batch.Supervisor = Over
batch.await_files = lambda paths: print("waits for", *paths)
sys.exit(batch.run_batch(Path(sys.argv[1]), None))
"""


@pytest.mark.parametrize("count", [0, 1])
def test_a_first_life_does_not_wait_for_its_files(
    slurm: StandIn, tmp_path: Path, count: int
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(f"extends = ['{ROOT}/configs/runs/demo-moe.toml']\n")
    done = subprocess.run(
        [sys.executable, "-c", BATCH, str(run_file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLURM_RESTART_COUNT": str(count)},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ("" if count == 0 else f"waits for {run_file}\n")
