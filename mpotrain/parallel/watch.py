"""A worker's watch over its launcher.

The `deepspeed` launcher dies of SIGTERM and SIGUSR1 and leaves its workers behind, training on
without anybody to stop them. A worker that sees its launcher go asks for a stop itself. That
launcher is two processes: the command itself, and on each node one that starts the workers and
lives on when the command dies.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

NODE_LAUNCHER = b"deepspeed.launcher.launch"
"""In the command line of the process that starts the workers of a node for `deepspeed`."""


@dataclass(frozen=True)
class Launcher:
    """The processes that started this one, as long as they live.

    Attributes:
        process: id of this process.
        parent: id of its parent.
        command: id of the `deepspeed` command behind a parent that is its node launcher.
    """

    process: int
    parent: int
    command: int | None

    @property
    def is_gone(self) -> bool:
        """Whether one of them has ended: a process without a parent is handed to another one."""
        if os.getppid() != self.parent:
            return True
        return self.command is not None and _parent_of(self.parent) != self.command


class ParentWatch:
    """A daemon thread that calls back once when the launcher is gone.

    Where the first parent is process 1 (a container's init) there is nothing to tell, and no
    thread is started.

    Attributes:
        parent: id of the parent at the start.
    """

    def __init__(self, on_orphan: Callable[[], None], interval: float = 1.0) -> None:
        """Start watching.

        Args:
            on_orphan: called once, in the watching thread; it should only set a flag.
            interval: seconds between two looks.
        """
        self._launcher = FIRST if os.getpid() == FIRST.process else find_launcher()
        self.parent = self._launcher.parent
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
            if self._launcher.is_gone:
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


def find_launcher() -> Launcher:
    """Return the processes that started this one."""
    parent, command = os.getppid(), None
    if NODE_LAUNCHER in _command_line(parent):
        command = _parent_of(parent)
        # Behind a node launcher that was started by hand stands a shell, whose end means nothing.
        if command is None or b"deepspeed" not in _command_line(command):
            command = None
    return Launcher(os.getpid(), parent, command)


def _command_line(process: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def _parent_of(process: int) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The name of a program stands in parentheses and may hold any character.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return None


FIRST = find_launcher()
"""What started this process; looked up on import, since it may be gone when the watch begins."""
