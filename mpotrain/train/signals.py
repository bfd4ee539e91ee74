"""Requests to stop: signals, a stop file, a time limit (no torch).

A request only raises a flag. The loop reads it between two steps, agrees on it over all ranks,
saves a checkpoint and leaves: no step is torn, whichever rank was asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from mpotrain.errors import StorageError

STOP_FILE = "stop"
"""Name of the stop file in the run folder: the one request that works behind any launcher."""

POLL_SECONDS = 1.0
"""Least time between two looks at the stop file: a shared file system is slow to ask."""

SAME_PRESS_SECONDS = 1.0
"""Two SIGINT within this time are one: terminal and launcher both pass Ctrl-C on."""


class StopReason(IntEnum):
    """Why a run was asked to stop; ranks agree on the largest."""

    NONE = 0
    """Nobody asked."""
    STOP_FILE = 1
    """The stop file exists."""
    TIME_LIMIT = 2
    """The time limit of this start is over."""
    SIGUSR1 = 3
    """A warning of the batch system before its time limit."""
    SIGHUP = 4
    """The terminal is gone: a closed window, a broken ssh connection."""
    SIGTERM = 5
    """The batch system or launcher ends the job."""
    SIGINT = 6
    """Ctrl-C."""
    LAUNCHER_DIED = 7
    """The process that started this one is gone."""

    @property
    def text(self) -> str:
        """The reason in words, for logs."""
        return _TEXTS[self]


_TEXTS = {
    StopReason.NONE: "no stop was asked for",
    StopReason.STOP_FILE: "the stop file was found",
    StopReason.TIME_LIMIT: "the time limit is over",
    StopReason.SIGUSR1: "signal SIGUSR1 came",
    StopReason.SIGHUP: "signal SIGHUP came (the terminal was closed)",
    StopReason.SIGTERM: "signal SIGTERM came",
    StopReason.SIGINT: "signal SIGINT came (Ctrl-C)",
    StopReason.LAUNCHER_DIED: "the launcher of this process died",
}

_SIGNALS = {
    signal.SIGUSR1: StopReason.SIGUSR1,
    signal.SIGHUP: StopReason.SIGHUP,
    signal.SIGTERM: StopReason.SIGTERM,
    signal.SIGINT: StopReason.SIGINT,
}


class StopRequest:
    """Collects requests to stop while it is entered as a context.

    Enter it early: until then a signal ends the process in the way of the system. It may be
    entered again inside; on leaving the outermost context the handlers of before are back.
    Outside the main thread Python allows no handlers: there only the stop file, the time limit
    and `request` count. A second Ctrl-C, more than a second after the first, kills the process
    at once.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        time_limit_seconds: float | None = None,
        watch_file: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock of the time limit; handlers are installed on entering.

        Args:
            run_folder: folder in which the stop file is looked for.
            time_limit_seconds: seconds from now after which a stop is asked for, or None.
            watch_file: look for the stop file; one rank of a run is enough.
            clock: monotonic time in seconds.
        """
        self._stop_file = run_folder / STOP_FILE
        self._watch_file = watch_file
        self._clock = clock
        self._deadline = None if time_limit_seconds is None else clock() + time_limit_seconds
        self._next_look = clock()
        self._reason = StopReason.NONE
        self._first_interrupt: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._depth = 0

    def __enter__(self) -> StopRequest:
        """Install the handlers of SIGUSR1, SIGHUP, SIGTERM and SIGINT."""
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # nohup: the run shall outlive its terminal.
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Bring back the handlers of before, on leaving the outermost context."""
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._previous.items():
            # A handler that was not set from Python reads as None and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def requested(self) -> int:
        """Return the `StopReason` asked for on this rank up to now, 0 for none.

        Once given, a reason stays (or gives way to a larger one).
        """
        now = self._clock()
        if self._deadline is not None and now >= self._deadline:
            self.request(StopReason.TIME_LIMIT)
        if self._watch_file and now >= self._next_look:
            self._next_look = now + POLL_SECONDS
            if self._stop_file.exists():
                self.request(StopReason.STOP_FILE)
        return int(self._reason)

    def request(self, reason: StopReason) -> None:
        """Ask for a stop from inside the process (safe in any thread)."""
        self._reason = max(self._reason, reason)

    def acknowledge(self) -> None:
        """Delete the stop file: the run has obeyed it, so the next start shall not.

        To be called by one rank once the checkpoint of the stop is complete. A run that is
        killed before that finds the file again and stops at its first opportunity.

        Raises:
            StorageError: the file is there and cannot be deleted.
        """
        try:
            with contextlib.suppress(FileNotFoundError):
                self._stop_file.unlink()
        except OSError as error:
            raise StorageError(
                f"{self._stop_file}: the stop file cannot be deleted ({error}); "
                "delete it before the next start, or that will stop at once"
            ) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = self._clock()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt > SAME_PRESS_SECONDS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
        self.request(_SIGNALS[signal.Signals(number)])
