"""Stop requests: real signals to this process and to others, the stop file, the time limit."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mpotrain.errors import StorageError
from mpotrain.train.signals import POLL_SECONDS, SAME_PRESS_SECONDS, StopReason, StopRequest


class Clock:
    """Time that moves only by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nothing_asked(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as stop:
        assert stop.requested() == 0


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP", "SIGTERM", "SIGINT"])
def test_signal_raises_the_flag_and_nothing_else(tmp_path: Path, name: str) -> None:
    with StopRequest(tmp_path) as stop:
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested() == StopReason[name]
        assert name in StopReason(stop.requested()).text


def test_handlers_of_before_are_back(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        mine = signal.getsignal(signal.SIGUSR1)
        others = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

        def fail() -> None:
            with StopRequest(tmp_path) as stop:
                with stop:
                    pass
                os.kill(os.getpid(), signal.SIGUSR1)
                assert stop.requested() == StopReason.SIGUSR1
                assert seen == []
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == others
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_under_nohup_a_closed_terminal_is_no_request(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_largest_reason_stays(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested() == StopReason.SIGTERM
        stop.request(StopReason.LAUNCHER_DIED)
        assert stop.requested() == StopReason.LAUNCHER_DIED


def test_stop_file_is_seen_polled_and_obeyed_once(tmp_path: Path) -> None:
    clock = Clock()
    with StopRequest(tmp_path, clock=clock) as stop:
        assert stop.requested() == 0
        (tmp_path / "stop").touch()
        clock.now += POLL_SECONDS / 2
        assert stop.requested() == 0
        clock.now += POLL_SECONDS / 2
        assert stop.requested() == StopReason.STOP_FILE
        stop.acknowledge()
        assert not (tmp_path / "stop").exists()
        assert stop.requested() == StopReason.STOP_FILE
        stop.acknowledge()
    with StopRequest(tmp_path) as again:
        assert again.requested() == 0


def test_stop_file_that_was_there_before_counts_at_once(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert StopRequest(tmp_path).requested() == StopReason.STOP_FILE
    assert StopRequest(tmp_path, watch_file=False).requested() == 0


def test_stop_file_that_cannot_be_deleted_is_named(tmp_path: Path) -> None:
    (tmp_path / "stop").mkdir()
    with pytest.raises(StorageError, match=r"stop: the stop file cannot be deleted"):
        StopRequest(tmp_path).acknowledge()


def test_time_limit(tmp_path: Path) -> None:
    clock = Clock()
    stop = StopRequest(tmp_path, time_limit_seconds=60.0, clock=clock)
    clock.now += 59.9
    assert stop.requested() == 0
    clock.now += 0.1
    assert stop.requested() == StopReason.TIME_LIMIT


def test_other_thread_gets_no_handlers_but_the_rest(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    result: list[object] = []

    def work() -> None:
        with StopRequest(tmp_path) as stop:
            result.append(signal.getsignal(signal.SIGTERM) is before)
            (tmp_path / "stop").touch()
            result.append(stop.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert result == [True, StopReason.STOP_FILE]


CHILD = """
import sys, time
from pathlib import Path
from mpotrain.train.signals import StopRequest
folder = Path(sys.argv[1])
# The size of a file is the time: it moves at once, and by hand.
with StopRequest(folder, clock=lambda: (folder / "clock").stat().st_size) as stop:
    print("ready", flush=True)
    told = False
    while True:
        if stop.requested() and not told:
            print("asked", flush=True)
            told = True
        time.sleep(0.01)
"""


def child(folder: Path) -> "subprocess.Popen[str]":
    (folder / "clock").write_bytes(b"")
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    with child(tmp_path) as process:
        try:
            process.send_signal(signal.SIGINT)
            assert process.stdout is not None
            assert process.stdout.readline() == "asked\n"
            # The launcher's echo of the same key press must not kill.
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            (tmp_path / "clock").write_bytes(b"." * math.ceil(SAME_PRESS_SECONDS + 1))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == -signal.SIGINT
        finally:
            process.kill()


def test_repeated_sigterm_never_kills(tmp_path: Path) -> None:
    with child(tmp_path) as process:
        try:
            for _ in range(3):
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGUSR1)
                time.sleep(0.05)
            assert process.poll() is None
        finally:
            process.kill()
