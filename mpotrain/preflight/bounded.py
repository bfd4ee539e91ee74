"""Time limits for things that can hang: a disk, a driver, a collective (no torch)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Countdown:
    """A number of seconds that runs out."""

    def __init__(self, seconds: float) -> None:
        """Start at `seconds`."""
        self._deadline = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._deadline - time.monotonic())


class Task(Generic[T]):
    """An action in a thread of its own, which nobody has to wait for longer than they want.

    A thread cannot be killed: where the action hangs for ever (a dead file system, a wedged
    driver), it is left behind, and the process ends through `os._exit`.
    """

    def __init__(self, action: Callable[[], T], name: str) -> None:
        """Start the action.

        Args:
            action: what to do.
            name: for the message if it takes too long.
        """
        self._name = name
        self._action = action
        self._results: list[T] = []
        self._errors: list[Exception] = []
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def result(self, seconds: float) -> T:
        """Return what the action returned.

        Args:
            seconds: how long to wait, counted from the start of the action.

        Raises:
            TimeoutError: it is not finished by then.
            Exception: what the action raised.
        """
        self._thread.join(max(0.0, self._start + seconds - time.monotonic()))
        if self._errors:
            raise self._errors[0]
        if not self._results:
            raise TimeoutError(f"{self._name} did not finish in {seconds:.0f} s")
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._action())
        except Exception as error:
            self._errors.append(error)


class HardLimit:
    """Calls back once when a time is over, from a thread of its own."""

    def __init__(self, seconds: float, on_expiry: Callable[[], None]) -> None:
        """Start the clock.

        Args:
            seconds: from now.
            on_expiry: called once if the limit is neither moved nor cancelled until then.
        """
        self._changed = threading.Condition()
        self._on_expiry = on_expiry
        self._cancelled = False
        self._left = Countdown(seconds)
        threading.Thread(target=self._run, name="hard-limit", daemon=True).start()

    @property
    def remaining(self) -> float:
        """Seconds left, at least 0."""
        return self._left.remaining

    def reset(self, seconds: float) -> None:
        """Let the limit be `seconds` from now."""
        with self._changed:
            self._left = Countdown(seconds)
            self._changed.notify()

    def cancel(self) -> None:
        """Never call back."""
        with self._changed:
            self._cancelled = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._cancelled and self.remaining > 0:
                self._changed.wait(self.remaining)
            if self._cancelled:
                return
        self._on_expiry()
