"""What a person sees while a run trains: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as LiveBar

from mpotrain.train.lasting_stream import LastingStream


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Numbers of one step for the eye; what is None is not shown.

    Attributes:
        step: steps done, this one included.
        loss: mean loss per token in nats.
        lr: scheduled learning rate.
        grad_norm: global gradient norm before clipping.
        bits_per_byte: loss in bits per byte of raw text.
        tokens_per_second: speed over all ranks.
        seconds_per_step: mean time of a step, for the time left.
        mfu: model FLOPs utilisation in [0, 1].
        memory_bytes: peak memory of this rank.
        skipped: reason why the update was not made.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    mfu: float | None = None
    memory_bytes: int | None = None
    skipped: str | None = None


def format_report(report: StepReport, total_steps: int) -> str:
    """Return a report as one line of text."""
    width = len(str(total_steps))
    parts = [f"step {report.step:>{width}}/{total_steps}", f"loss {report.loss:.4f}"]
    if report.bits_per_byte is not None:
        parts.append(f"bits/byte {report.bits_per_byte:.4f}")
    parts += [f"lr {report.lr:.3e}", f"grad norm {report.grad_norm:.3g}"]
    if report.tokens_per_second is not None:
        parts.append(f"{_short(report.tokens_per_second)} tok/s")
    if report.mfu is not None:
        parts.append(f"MFU {100 * report.mfu:.1f} %")
    if report.memory_bytes is not None:
        parts.append(f"{report.memory_bytes / 2**30:.2f} GiB")
    if report.seconds_per_step is not None:
        parts.append(f"eta {format_duration(report.seconds_per_step * _left(report, total_steps))}")
    if report.skipped is not None:
        parts.append(f"SKIPPED: {report.skipped}")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Return a time as `12:34`, `1:02:03` or `2d 01:02:03`; a part of a second rounds up."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows reports: one live line where the console is a terminal, else a line now and then.

    Plain lines come for the first report, every `every` steps, the last step, and every skipped
    step. To be used as a context; with `is_main` False it shows nothing.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        is_main: bool,
        every: int = 10,
        console: Console | None = None,
    ) -> None:
        """Prepare the display.

        Args:
            total_steps: steps of the whole run.
            is_main: whether this process shows anything.
            every: steps between two plain lines.
            console: where to show it; by default standard error, away from real output, for as
                long as somebody can read it.
        """
        self._total_steps, self._is_main, self._every = total_steps, is_main, every
        # A process without standard error shows nothing.
        stream = None if sys.stderr is None else cast("TextIO", LastingStream(sys.stderr))
        self._console = console or Console(file=stream, stderr=True)
        self._live: LiveBar | None = None
        self._task: TaskID | None = None
        self._shown_any = False

    def __enter__(self) -> Progress:
        """Start the live line if there is a terminal."""
        if self._is_main and self._console.is_terminal:
            self._live = LiveBar(
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
                console=self._console,
            )
            self._live.start()
            self._task = self._live.add_task("starting", total=self._total_steps)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the live line; its last state stays on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, report: StepReport) -> None:
        """Show a report, or leave it out where it is not its turn."""
        if not self._is_main:
            return
        text = format_report(report, self._total_steps)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=report.step, description=text)
            if report.skipped is not None:
                self.note(text)
            return
        due = report.step % self._every == 0 or report.step == self._total_steps
        if due or report.skipped is not None or not self._shown_any:
            self.note(text)
        self._shown_any = True

    def note(self, text: str) -> None:
        """Print a line that stays (above the live line where there is one)."""
        if self._is_main:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _left(report: StepReport, total_steps: int) -> int:
    return max(0, total_steps - report.step)


def _short(number: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"
