"""A worker's watch over its launcher.

The `deepspeed` launcher dies of SIGTERM and SIGUSR1 and leaves its workers behind, training on
without anybody to stop them. A worker that sees its parent go asks for a stop itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType


class ParentWatch:
    """A daemon thread that calls back once when the parent process is gone.

    A process that loses its parent is handed to another one, so the parent's id changes. Where the
    first parent is already process 1 (a container's init) there is nothing to tell, and no thread
    is started.

    Attributes:
        parent: id of the parent at the start.
    """

    def __init__(self, on_orphan: Callable[[], None], interval: float = 1.0) -> None:
        """Start watching.

        Args:
            on_orphan: called once, in the watching thread; it should only set a flag.
            interval: seconds between two looks.
        """
        self.parent = os.getppid()
        self._on_orphan = on_orphan
        self._interval = interval
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if self.parent != 1:
            self._thread = threading.Thread(target=self._run, name="parent-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> ParentWatch:
        """Return the watch itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self.stop()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            if os.getppid() != self.parent:
                self._on_orphan()
                return


def watch_parent(on_orphan: Callable[[], None], interval: float = 1.0) -> ParentWatch:
    """Call `on_orphan` once when the parent process of this one ends.

    Args:
        on_orphan: called in the watching thread; it should only set a flag.
        interval: seconds between two looks.

    Returns:
        The watch; `stop()` it, or use it in a `with` statement.
    """
    return ParentWatch(on_orphan, interval)
