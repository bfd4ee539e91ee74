"""What `prepare` shows while it works: a bar on a terminal, now and then a line in a log file."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LINE_SECONDS = 15.0
"""Time between two lines where the output is no terminal."""


class PrepareProgress:
    """Count documents, bytes and tokens, and show them on the error stream.

    Args:
        enabled: show anything at all.
        total_bytes: size of the whole text, if known.
        console: where to show it; default: the error stream.
    """

    def __init__(
        self, *, enabled: bool, total_bytes: int | None = None, console: Console | None = None
    ) -> None:
        self._console = console or Console(stderr=True)
        self._enabled = enabled
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not enabled or not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("prepare", total=total_bytes, counts="")
        self._start = self._last_line = time.monotonic()
        self._num_documents = self._num_bytes = self._num_tokens = 0

    def stage(self, text: str) -> None:
        """Name what is done now; rates count from here."""
        self._start = self._last_line = time.monotonic()
        self._bar.update(self._task, description=text)
        if self._enabled and not self._console.is_terminal:
            self._console.print(f"prepare: {text}", highlight=False)

    def advance(self, num_documents: int, num_bytes: int, num_tokens: int) -> None:
        """Add to the counts."""
        self._num_documents += num_documents
        self._num_bytes += num_bytes
        self._num_tokens += num_tokens
        self._bar.update(self._task, advance=num_bytes, counts=self._counts())
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            if self._enabled and not self._console.is_terminal:
                self._console.print(f"prepare: {self._counts()}", highlight=False)

    def _counts(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return (
            f"{self._num_documents:,} documents, {self._num_bytes / 1e6:,.1f} MB, "
            f"{self._num_tokens / 1e6:,.2f} M tokens, {self._num_bytes / 1e6 / seconds:,.2f} MB/s"
        )

    def __enter__(self) -> PrepareProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if self._enabled and kind is None:
            self._console.print(f"prepare: done: {self._counts()}", highlight=False)
