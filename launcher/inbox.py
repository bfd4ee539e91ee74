"""Signals as letters: handlers only take them in, the main loop reads them when it is ready."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""What SLURM and people send to a batch script."""


class SignalInbox:
    """Collects signals, and wakes its reader when one comes or a child ends.

    Only the main thread may use it. A batch script must not be killed by a signal that comes late:
    what it ignores at its end stays ignored until the process is gone.
    """

    def __init__(self) -> None:
        self._arrived: list[signal.Signals] = []
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = -1
        self._ignores_ends = False

    def __enter__(self) -> SignalInbox:
        """Install the handlers."""
        self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            self._previous[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Bring back the handlers of before, but for signals that are ignored from now on."""
        for number, handler in self._previous.items():
            if self._ignores_ends and number in SIGNALS:
                continue
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._reader)
        os.close(self._writer)

    @property
    def has_letters(self) -> bool:
        """Whether signals have come that nobody has read yet."""
        return bool(self._arrived)

    def wait(self, seconds: float) -> list[signal.Signals]:
        """Sleep until a signal comes, a child ends or the time is over.

        Args:
            seconds: longest time to sleep.

        Returns:
            The signals that have come since the last call, without SIGCHLD.
        """
        if not self._arrived:
            select.select([self._reader], [], [], max(0.0, seconds))
        self._drain()
        # Python handlers run between two byte codes of this thread, so nothing gets lost here.
        arrived, self._arrived = self._arrived, []
        return arrived

    def ignore_ends(self) -> None:
        """Ignore SIGTERM and the warning from here on, in this process and those it starts.

        `scontrol requeue` ends the very script that calls it; what is left to do must be done.
        """
        self._ignores_ends = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _take(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number != signal.SIGCHLD:
            self._arrived.append(signal.Signals(number))

    def _drain(self) -> None:
        try:
            while os.read(self._reader, 4096):
                pass
        except BlockingIOError:
            return
