"""The watchdog in real processes: what hangs ends and says where, what works is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from mpotrain.errors import EXIT_CRASH, EXIT_HUNG
from mpotrain.parallel.watchdog import Watchdog, beating, collective_timeout, no_beat

SCRIPT = Path(__file__).with_name("watched_process.py")
REPOSITORY = Path(__file__).resolve().parents[3]
PATIENCE = 100.0
"""Seconds after which a test of a loaded machine gives up."""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a watched process of the test's run folder; none outlives the test."""
    running: list[subprocess.Popen[str]] = []

    def run(*actions: str, timeout: float, rank: int = 0, size: int = 1) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path), str(rank), str(size), str(timeout),
             *actions],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""},
        )  # fmt: skip
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out + err


def wait_for(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def hang_folder(run_folder: Path) -> Path:
    (folder,) = [path for path in (run_folder / "hangs").iterdir() if path.is_dir()]
    return folder


def test_a_process_that_hangs_says_where_and_ends(start: Start, tmp_path: Path) -> None:
    code, output = ended(start("beat:0.2", "wait:1000", timeout=0.6))
    assert code == EXIT_HUNG
    assert "rank 0: no progress for" in output
    folder = hang_folder(tmp_path)
    assert folder.name.endswith("-step7")
    text = (folder / "rank-0.txt").read_text()
    assert "in where_it_waits" in text
    assert "in: waiting for nobody" in text
    assert "after step 7" in text
    assert json.loads((folder / "rank-0.trace.json").read_text()) == {"rank": 0, "recorders": {}}
    (line,) = (tmp_path / "ends.txt").read_text().splitlines()
    assert line.startswith("0 (0,) 7 no progress for 0.0 minutes after step 7")
    assert (folder / "summary.txt").read_text().strip() in line
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_work_that_beats_is_left_alone(start: Start, tmp_path: Path) -> None:
    assert ended(start("beat:3", timeout=1.5)) == (0, "the end\n")
    assert list(tmp_path.iterdir()) == []


def test_work_without_a_timeout_is_left_alone(start: Start, tmp_path: Path) -> None:
    assert ended(start("wait:1", timeout=0)) == (0, "the end\n")
    assert list(tmp_path.iterdir()) == []


def test_a_suspended_process_does_not_hang(start: Start, tmp_path: Path) -> None:
    """4 seconds pass in the middle of 1 second of silent work, 3 make a hang."""
    process = start("beat:0.2", "say:ready", "silent:20", "beat:0.1", timeout=3.0)
    wait_for(tmp_path / "ready")
    time.sleep(0.2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    assert ended(process) == (0, "the end\n")


def test_an_interpreter_that_is_never_given_back_ends_by_the_clock(start: Start) -> None:
    code, output = ended(start("end:1", "beat:0.5", "hold:900", timeout=1.0))
    assert code == EXIT_CRASH
    assert "Timeout" in output
    assert "in hold" in output


def test_a_rank_may_wait_long_for_another_that_works(start: Start, tmp_path: Path) -> None:
    """Rank 1 is silent for several timeouts while rank 0 works; both go on."""
    ranks = [
        start("say:zero", "until:one", "beat:6", timeout=2.0, rank=0, size=2),
        start("until:zero", "say:one", "wait:5", timeout=2.0, rank=1, size=2),
    ]
    assert [ended(rank) for rank in ranks] == [(0, "the end\n")] * 2
    assert not (tmp_path / "hangs").exists()
    assert (tmp_path / "pulse").is_file()


def test_all_ranks_of_a_hang_write_into_one_folder(start: Start, tmp_path: Path) -> None:
    ranks = [
        start(f"say:{rank}", f"until:{(rank + 1) % 3}", f"beat:{0.2 * rank}", "wait:1000",
              timeout=1.5, rank=rank, size=3)
        for rank in range(3)
    ]  # fmt: skip
    results = [ended(rank) for rank in ranks]
    assert [code for code, _ in results] == [EXIT_HUNG] * 3
    folder = hang_folder(tmp_path)
    for rank in range(3):
        assert f"rank {rank} of 3" in (folder / f"rank-{rank}.txt").read_text()
        assert json.loads((folder / f"rank-{rank}.trace.json").read_text())["rank"] == rank
    (line,) = (tmp_path / "ends.txt").read_text().splitlines()
    assert line.startswith("0 (0, 1, 2) 7 ")
    assert "no answer" not in line


def test_one_rank_that_notices_is_enough(start: Start, tmp_path: Path) -> None:
    ranks = [
        start(f"say:{rank}", f"until:{1 - rank}", "wait:1000", timeout=timeout, rank=rank, size=2)
        for rank, timeout in enumerate((1.5, 12.0))
    ]
    assert [ended(rank)[0] for rank in ranks] == [EXIT_HUNG] * 2
    text = (hang_folder(tmp_path) / "rank-1.txt").read_text()
    assert float(text.partition("no progress for ")[2].split()[0]) < 11.0
    assert (tmp_path / "ends.txt").read_text().startswith("0 (0, 1) ")


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_does_not_hold_the_other(start: Start, tmp_path: Path, stopped: int) -> None:
    ranks = [
        start(
            "grace:2", f"say:{rank}", f"until:{1 - rank}", "wait:1000",
            timeout=1.5, rank=rank, size=2,
        )
        for rank in range(2)
    ]  # fmt: skip
    for name in ("0", "1"):
        wait_for(tmp_path / name)
    time.sleep(0.3)
    ranks[stopped].send_signal(signal.SIGSTOP)
    assert ended(ranks[1 - stopped])[0] == EXIT_HUNG
    (line,) = (tmp_path / "ends.txt").read_text().splitlines()
    assert line.startswith(f"{1 - stopped} ({1 - stopped},) 7 ")
    assert line.endswith(f"no answer from 1 of 2 ranks: {stopped}")
    # It comes back, much later, and must neither go on nor speak for the run.
    ranks[stopped].send_signal(signal.SIGCONT)
    assert ended(ranks[stopped])[0] == EXIT_HUNG
    assert (tmp_path / "ends.txt").read_text().splitlines() == [line]
    assert (hang_folder(tmp_path) / f"rank-{stopped}.txt").is_file()


def test_a_folder_that_cannot_be_written_does_not_keep_a_hung_process(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "hangs").write_text("not a folder")
    code, output = ended(start("wait:1000", timeout=0.5))
    assert code == EXIT_HUNG
    assert "rank 0: hangs, and cannot write where" in output
    assert "in where_it_waits" in output


def test_a_process_that_hangs_while_it_prints_ends(start: Start, tmp_path: Path) -> None:
    """Nobody reads its output, so that the hanging thread holds the lock of the stream."""
    process = start("end:5", "beat:0.2", "print:1000000", timeout=0.6)
    assert process.wait(timeout=PATIENCE) == EXIT_HUNG
    assert "in print" in (hang_folder(tmp_path) / "rank-0.txt").read_text()


def test_old_hangs_go_when_the_ranks_have_met(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / "hangs" / f"20260101-0000{number:02}-step1").mkdir(parents=True)
    Watchdog(1.0, tmp_path, rank=1, size=2).met("now")
    assert len(list((tmp_path / "hangs").iterdir())) == 12
    Watchdog(1.0, tmp_path, rank=0, size=2).met("now")
    assert len(list((tmp_path / "hangs").iterdir())) == 10


def test_a_hurried_process_ends_even_without_a_timeout(start: Start) -> None:
    assert ended(start("hurry:0.5", "wait:1000", timeout=0))[0] == EXIT_HUNG


def test_hurry_leaves_time_for_the_longest_work_up_to_now(start: Start) -> None:
    # 1.5 seconds of silence were normal here, so 1.5 more are. (Looks are as far apart as a
    # fortieth of the timeout.)
    actions = ("wait:1.5", "beat:0.5", "hurry:0.2", "wait:1.5", "beat:0.1")
    assert ended(start(*actions, timeout=16))[0] == 0
    assert ended(start("beat:0.5", "hurry:0.2", "wait:1000", timeout=1000))[0] == EXIT_HUNG


def test_a_watch_can_be_left(tmp_path: Path) -> None:
    with Watchdog(0.5, tmp_path) as dog:
        dog.beat("working", 3)
        assert dog.step == 3
    time.sleep(1.0)  # longer than the timeout: this process is still here
    dog.yield_to_hang()


def test_torch_waits_longer_than_the_watchdog() -> None:
    assert collective_timeout(None) == timedelta(minutes=30)
    assert collective_timeout(60.0) == timedelta(minutes=30)
    assert collective_timeout(20 * 60.0) == timedelta(minutes=80)


def test_beats_around_items() -> None:
    phases: list[str] = []

    def beat(phase: str, step: int | None = None) -> None:
        phases.append(phase)

    seen = []
    for item in beating("abc", beat, "reading"):
        seen.append((item, len(phases)))
    assert seen == [("a", 1), ("b", 2), ("c", 3)]
    assert phases == ["reading"] * 4
    no_beat("nothing")
