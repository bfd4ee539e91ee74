"""A watch over the progress of this process: a run that hangs says where, and ends.

A collective waits for ranks that may be gone, stopped or on another path, and nothing in the
program would ever notice. Every rank has a thread that does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from mpotrain.errors import EXIT_HUNG
from mpotrain.parallel.hang_folder import Hang, HangFolder, Pulse, wait_until

T = TypeVar("T")

PULSE_FILE = "pulse"
"""File in the run folder that ranks touch while they make progress."""
POLL_SECONDS = 2.0
"""Most time between two looks of the watching thread."""
GRACE_SECONDS = 15.0
"""How long a rank waits for the others to write where they stand."""
END_SECONDS = 60.0
"""Most time for the end of a rank that hangs; its storage may be what hangs."""
FLUSH_SECONDS = 2.0
"""Most time for what was printed and is not written yet."""
ORPHAN_SECONDS = 300.0
"""Timeout of a rank whose launcher is gone, unless its steps are longer."""
PARTS = 8
"""A pulse is given and felt this often in a timeout."""
LEAST_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class Beat(Protocol):
    """Told by the working thread that it makes progress."""

    def __call__(self, phase: str, step: int | None = None) -> None:
        """Make it known.

        Args:
            phase: what is done from now on, in words.
            step: steps done; None = as before.
        """


def no_beat(phase: str, step: int | None = None) -> None:
    """Do nothing: nobody watches."""


def beating(items: Iterable[T], beat: Beat, phase: str) -> Iterator[T]:
    """Yield `items`, with a beat before and after each."""
    for item in items:
        beat(phase)
        yield item
    beat(phase)


def collective_timeout(hang_seconds: float | None) -> timedelta:
    """Return how long a collective may wait for other ranks before torch ends it with an error.

    The watchdog has to come first, because it says where all ranks stand; and it knows that a rank
    may wait long for another one that makes progress. So torch's timeout, which knows nothing, is
    four times as long, and 30 minutes at least (or where there is no watchdog).
    """
    if hang_seconds is None:
        return LEAST_COLLECTIVE_TIMEOUT
    return max(LEAST_COLLECTIVE_TIMEOUT, 4 * timedelta(seconds=hang_seconds))


class Watchdog:
    """A daemon thread that ends the process when no rank of the run makes progress any more.

    It counts the time since the last beat while it runs itself: a job that was suspended, or a
    machine that stood still, is not a hang. Beats of other ranks count like its own; they are seen
    through a file in the run folder, a quarter of the timeout late at most. When the time is over,
    or when another rank says that it is, the process writes where its threads stand and its last
    collectives, waits a moment for the others to do the same, and ends with `EXIT_HUNG` whatever
    its main thread does.

    The thread needs the interpreter. Should the main thread never give it back, a timer in C ends
    the process with exit code 1 after twice the timeout, its stacks on standard error. That timer
    counts wall time, so a job suspended for longer than that ends too.

    To be used as a context.
    """

    def __init__(
        self,
        timeout: float | None,
        run_folder: Path,
        *,
        rank: int = 0,
        size: int = 1,
        on_hang: Callable[[Hang], None] = lambda hang: None,
        has_ended: Callable[[], bool] = lambda: True,
        grace: float = GRACE_SECONDS,
    ) -> None:
        """Prepare a watch.

        Args:
            timeout: seconds without progress that make a hang; None = never.
            run_folder: the run folder, shared by all ranks.
            rank: number of this process.
            size: number of processes.
            on_hang: called in the watching thread of the lowest rank that answers, before it ends;
                it records the end of the run.
            has_ended: whether the end of the run is on record; other ranks wait for that a moment.
            grace: seconds to wait for the other ranks.
        """
        self.rank, self.size = rank, size
        self._timeout = inf if timeout is None else timeout
        self._on_hang, self._has_ended, self._grace = on_hang, has_ended, grace
        self._files = HangFolder(run_folder, rank)
        self._pulse = Pulse(run_folder / PULSE_FILE) if size > 1 else None
        self._count, self._phase, self._step = 0, "starting", 0
        self._told = -1
        self._silent, self._longest = 0.0, 0.0
        self._stop = threading.Event()
        self._ending = threading.Lock()
        self._thread: threading.Thread | None = None

    def beat(self, phase: str, step: int | None = None) -> None:
        """Note progress; see `Beat`. Safe in any thread, and cheap."""
        self._phase = phase
        if step is not None:
            self._step = step
        self._count += 1

    @property
    def step(self) -> int:
        """Steps done, as far as beats have told."""
        return self._step

    def met(self, life: str) -> None:
        """Say that all ranks have met.

        Args:
            life: id of this start, the same on all ranks, never used before.
        """
        if self.rank == 0:
            self._files.forget_old()
        self._files.life = life

    def hurry(self, seconds: float = ORPHAN_SECONDS) -> None:
        """Be less patient from now on, but leave time for work as long as any up to now."""
        self._timeout = min(self._timeout, max(seconds, 3 * self._longest))

    def yield_to_hang(self) -> None:
        """Do not return if this run is being ended as hung.

        Called by a main thread whose work has failed: its peers may be gone because they hung.
        """
        folder = self._files.named()
        if folder is not None or self._ending.locked():
            self._end(folder)

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._watch, name="hang-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @property
    def _interval(self) -> float:
        return min(POLL_SECONDS, max(self._timeout / 40, 0.02))

    def _watch(self) -> None:
        count, before = -1, time.monotonic()
        since_pulse = inf
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            # Time in which this thread did not run either proves nothing.
            passed = min(now - before, 3 * self._interval)
            before, since_pulse = now, since_pulse + passed
            self._silent += passed
            self._longest = max(self._longest, self._silent)
            if count != self._count:
                count, self._silent = self._count, 0.0
            if since_pulse >= self._timeout / PARTS:
                since_pulse = 0.0
                self._feel()
                self._arm()
            self._look()

    def _feel(self) -> None:
        """Tell the others of progress, or hear of theirs."""
        if self._pulse is None:
            return
        if self._told != self._count:
            self._told = self._count
            self._pulse.touch()
        elif self._pulse.moved():
            self._silent = 0.0

    def _look(self) -> None:
        """End the process if the run hangs, or another rank says so."""
        if self._timeout == inf:
            return
        if self._silent >= min(self._timeout / 4, 30.0):
            folder = self._files.named()
            if folder is not None:
                self._end(folder)
        if self._silent < self._timeout:
            return
        if self._pulse is not None and self._pulse.moved():
            self._silent = 0.0
        else:
            self._end(None)

    def _arm(self) -> None:
        if self._timeout < inf:
            faulthandler.dump_traceback_later(2 * self._timeout + END_SECONDS, exit=True, file=2)

    def _end(self, folder: Path | None) -> None:
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends the process
        try:
            faulthandler.dump_traceback_later(END_SECONDS + self._grace, exit=True, file=2)
            self._report(folder)
        except Exception as error:
            _say(f"rank {self.rank}: hangs, and cannot write where: {error}")
            faulthandler.dump_traceback(2)
        finally:
            _flush()
            os._exit(EXIT_HUNG)

    def _report(self, named: Path | None) -> None:
        phase, silent, step = self._phase, self._silent, self._step
        facts = [
            f"rank {self.rank} of {self.size}, process {os.getpid()} on {platform.node()}, "
            f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC",
            f"no progress for {silent:.1f} s after step {step}, in: {phase}",
        ]
        _say(f"rank {self.rank}: {facts[1]}; this process ends")
        folder = self._files.name(step) if named is None else named
        self._files.write(folder, facts)
        wait_until(lambda: len(self._files.answered(folder)) == self.size, self._grace)
        answered = self._files.answered(folder)
        hang = Hang(folder, step, phase, silent, answered, self.size)
        if answered[:1] == (self.rank,) and self._files.summarize(folder, hang.describe()):
            _say(f"rank {self.rank}: {hang.describe()}")
            self._on_hang(hang)
        else:
            wait_until(self._has_ended, self._grace / 3)


def _flush() -> None:
    """Write out what has been printed, unless the thread that hangs is printing."""
    thread = threading.Thread(target=sys.stdout.flush, daemon=True)
    with contextlib.suppress(Exception):
        thread.start()
        thread.join(FLUSH_SECONDS)


def _say(text: str) -> None:
    # The log of a process that is about to end: the stream may be held by the thread that hangs.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))
