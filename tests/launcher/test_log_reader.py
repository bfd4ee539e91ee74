"""`logs`: the newest log of a run, followed over requeues and resubmissions."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_commands_fake import FakeSlurm, make_run, write_lines

from launcher import logs
from launcher.log_reader import LogTail, newest_log
from launcher.logs import LogFollower
from launcher.run_reader import read_run
from launcher.slurm_queue import SlurmQueue
from mpotrain.errors import ConfigError


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


def write_log(run: Path, job_id: str, text: str, *, time: float | None = None) -> Path:
    path = run / "logs" / f"{job_id}.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(text)
    if time is not None:
        os.utime(path, (time, time))
    return path


def event(job_id: str, name: str, time: float) -> dict[str, Any]:
    return {"event": name, "job_id": job_id, "time": time, "life": 0}


class Following:
    """Follows a log; each pause plays the next scene."""

    def __init__(self, run: Path, scenes: list[Callable[[], None]], **more: Any) -> None:
        self.out, self.notes, self.seconds = io.BytesIO(), list[str](), 0.0
        self._scenes, self._pause = scenes, more.get("pause", 3.0)
        follower = LogFollower(
            run,
            more.get("job_id"),
            more.get("num_lines", 10),
            SlurmQueue(),
            self.out,
            note=self.notes.append,
            sleep=self._sleep,
            clock=lambda: self.seconds,
        )
        self.code = follower.follow()
        self.text = self.out.getvalue().decode()

    def _sleep(self, seconds: float) -> None:
        del seconds
        self.seconds += self._pause
        if self._scenes:
            self._scenes.pop(0)()
        assert self.seconds < 1000, "it does not end"


def test_the_newest_log_is_that_of_the_newest_life(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lives = [event("9", "started", 100.0), event("10", "started", 200.0)]
    write_lines(run / "launch" / "lives.jsonl", lives)
    write_log(run, "9", "late words of slurmstepd", time=300.0)
    new = write_log(run, "10", "new", time=250.0)
    assert newest_log(read_run(run)) == new
    # A job that has not yet reached its supervisor, or died before.
    silent = write_log(run, "11", "module: command not found", time=260.0)
    assert newest_log(read_run(run)) == silent
    write_lines(run / "launch" / "lives.jsonl", [event("9", "started", 400.0)])
    assert newest_log(read_run(run)) == run / "logs" / "9.log"
    assert newest_log(read_run(tmp_path)) is None


def test_show_prints_the_last_lines(
    tmp_path: Path, slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    write_log(run, "11", "one\ntwo\nthree\nfour")
    write_log(run, "10", "old\n", time=5.0)
    parser = argparse.ArgumentParser()
    logs.add_arguments(parser)

    def command(*arguments: str) -> int:
        return logs.main(parser.parse_args([str(run), *arguments]))

    assert command("--lines", "2") == 0
    assert capfdbinary.readouterr().out == b"three\nfour"
    assert command("--job", "10") == 0
    assert capfdbinary.readouterr().out == b"old\n"
    for bad in (["--job", "../../etc/passwd"], ["--job", "77"], ["--lines", "-1"]):
        with pytest.raises(ConfigError):
            command(*bad)
    del slurm


def test_no_log_yet_is_explained(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "PENDING", reason="Resources")
    with pytest.raises(ConfigError, match=r"queued \(Resources\)"):
        LogFollower(run, None, 5, SlurmQueue(), io.BytesIO()).show()


def test_follow_goes_on_over_requeue_and_resubmission_and_ends_with_the_run(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    run = make_run(tmp_path / "run", job_id="11", lives=[event("11", "started", 100.0)])
    write_log(run, "11", "life 0\n")
    slurm.add("11", "RUNNING")
    lives = run / "launch" / "lives.jsonl"

    def requeue() -> None:
        (run / "outcome.json").write_text(json.dumps({"outcome": "resume"}))
        slurm.update("11", state="PENDING")

    def second_life() -> None:
        (run / "outcome.json").unlink()
        slurm.update("11", state="RUNNING")
        write_log(run, "11", "life 1\n")

    def resubmit() -> None:
        slurm.add("12", "PENDING")
        write_lines(lives, [{**event("11", "resubmitted", 300.0), "next_job": "12"}])
        slurm.update("11", state="COMPLETED")
        write_log(run, "11", "last words\n")

    def third_life() -> None:
        write_lines(lives, [event("12", "started", 400.0)])
        slurm.update("12", state="RUNNING")
        write_log(run, "12", "life 2\n")
        write_log(run, "11", "even later words\n", time=500.0)

    def end() -> None:
        write_log(run, "12", "done\n")
        (run / "outcome.json").write_text(json.dumps({"outcome": "done"}))
        slurm.update("12", state="COMPLETED")

    def idle() -> None:
        pass

    long_idle = [idle] * 12
    scenes = [idle, requeue, *long_idle, second_life, *long_idle, resubmit, *long_idle]
    seen = Following(run, [*scenes, third_life, *long_idle, end])
    assert seen.code == 0
    assert seen.text == "life 0\nlife 1\nlast words\neven later words\nlife 2\ndone\n"
    assert [Path(note.split()[1]).name for note in seen.notes] == ["11.log", "12.log"]
    # The queue is asked now and then only.
    assert len(slurm.calls("squeue")) < seen.seconds / 5


def test_follow_waits_for_the_first_log(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "PENDING", reason="Priority")

    def start() -> None:
        slurm.update("11", state="RUNNING")
        write_log(run, "11", "".join(f"line {n}\n" for n in range(20)))

    def end() -> None:
        slurm.update("11", state="FAILED")

    seen = Following(run, [start, end], num_lines=3)
    assert seen.text == "line 17\nline 18\nline 19\n"
    assert seen.notes[0] == "the run is queued (Priority)"


def test_follow_ends_where_no_log_will_ever_be(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    slurm.add("11", "PENDING")
    seen = Following(run, [lambda: slurm.update("11", state="CANCELLED")])
    assert seen.code == 2
    assert seen.text == ""


def test_a_queue_that_is_away_does_not_end_it(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    write_log(run, "11", "a\n")
    slurm.add("11", "RUNNING")

    def away() -> None:
        slurm.set(trouble={"squeue": "Unable to contact slurm controller"})

    def back() -> None:
        slurm.set(trouble={})
        write_log(run, "11", "b\n")

    def end() -> None:
        slurm.update("11", state="COMPLETED")

    nothing: list[Callable[[], None]] = [lambda: None] * 20
    assert Following(run, [away, *nothing, back, end]).text == "a\nb\n"


def test_the_moment_between_two_jobs_is_not_taken_for_the_end(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    run = make_run(tmp_path / "run", job_id="11", lives=[event("11", "started", 100.0)])
    write_log(run, "11", "a\n")
    slurm.add("11", "RUNNING")

    def gone() -> None:
        (run / "outcome.json").write_text(json.dumps({"outcome": "failed"}))
        slurm.update("11", state="COMPLETED")

    def back() -> None:
        write_lines(run / "launch" / "lives.jsonl", [event("12", "started", 200.0)])
        slurm.add("12", "RUNNING")
        write_log(run, "12", "b\n")

    def end() -> None:
        slurm.update("12", state="COMPLETED")

    # Every pause is long enough for a question to the queue.
    seen = Following(run, [lambda: None, gone, back, end], pause=20.0)
    assert seen.text == "a\nb\n"


def test_following_one_job_ends_with_it(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="12")
    write_log(run, "11", "old\n")
    write_log(run, "12", "new\n")
    slurm.add("11", "COMPLETED")
    slurm.add("12", "RUNNING")
    seen = Following(run, [], job_id="11")
    assert (seen.text, seen.code) == ("old\n", 0)


def test_a_file_that_was_cut_or_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("first\nsecond\n")
    tail = LogTail(path, 1)
    assert tail.read() == b"second\n"
    assert tail.read() == b""
    path.write_text("cut\n")
    assert tail.read() == b"cut\n"
    other = tmp_path / "other"
    other.write_text("replaced, and longer\n")
    other.replace(path)
    assert tail.read() == b"replaced, and longer\n"
    path.unlink()
    assert tail.read() == b""


def test_bytes_that_are_no_text_pass(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run", job_id="11")
    write_log(run, "11", "")
    content = b"\xff\xfe\x00\r\x1b[K\n"
    (run / "logs" / "11.log").write_bytes(content)
    out = io.BytesIO()
    LogFollower(run, None, 5, SlurmQueue(), out, note=lambda text: None).show()
    assert out.getvalue() == content
    del slurm
