"""What is shown: the text of a line, when a plain line comes, and the live line."""

import dataclasses
import io

import pytest
from rich.console import Console

from mpotrain.train.progress import Progress, StepReport, format_duration, format_report

REPORT = StepReport(step=7, loss=3.21987, lr=3e-4, grad_norm=0.51234)


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=200, _environ={}), stream


def at(step: int, **changes: object) -> StepReport:
    return dataclasses.replace(REPORT, step=step, **changes)  # type: ignore[arg-type]


def test_line_without_optional_numbers() -> None:
    expected = "step    7/1000  loss 3.2199  lr 3.000e-04  grad norm 0.512"
    assert format_report(REPORT, 1000) == expected


def test_line_with_everything() -> None:
    report = at(
        250,
        bits_per_byte=1.23456,
        tokens_per_second=12_345.0,
        seconds_per_step=2.0,
        mfu=0.4123,
        memory_bytes=3 * 2**29,
        skipped="loss is nan",
    )
    assert format_report(report, 1000) == (
        "step  250/1000  loss 3.2199  bits/byte 1.2346  lr 3.000e-04  grad norm 0.512  "
        "12.3k tok/s  MFU 41.2 %  1.50 GiB  eta 25:00  SKIPPED: loss is nan"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0:00"),
        (0.2, "0:01"),
        (61.0, "1:01"),
        (3599.5, "1:00:00"),
        (3723.0, "1:02:03"),
        (2 * 86400 + 3723.0, "2d 01:02:03"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("speed", "text"), [(999.0, "999 tok/s"), (2.5e6, "2.5M tok/s"), (1e9, "1G tok/s")]
)
def test_speeds(speed: float, text: str) -> None:
    assert f"  {text}" in format_report(at(1, tokens_per_second=speed), 10)


def test_plain_lines_come_first_every_few_last_and_when_skipped() -> None:
    target, stream = console(terminal=False)
    with Progress(25, is_main=True, every=10, console=target) as progress:
        for step in range(3, 26):
            progress.update(at(step, skipped="loss is nan" if step == 17 else None))
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [3, 10, 17, 20, 25]
    assert lines[2].endswith("SKIPPED: loss is nan")
    assert "\x1b" not in stream.getvalue()


def test_long_line_is_not_wrapped_and_markup_is_text() -> None:
    stream = io.StringIO()
    target = Console(file=stream, force_terminal=False, width=20, _environ={})
    with Progress(25, is_main=True, console=target) as progress:
        progress.note("[red]" + "x" * 100)
    assert stream.getvalue() == "[red]" + "x" * 100 + "\n"


def test_terminal_shows_one_live_line_that_ends_at_the_last_step() -> None:
    target, stream = console(terminal=True)
    with Progress(25, is_main=True, every=1, console=target) as progress:
        for step in range(1, 26):
            progress.update(at(step))
        progress.note("saved")
    text = stream.getvalue()
    assert "step 25/25  loss 3.2199" in text
    assert text.count("step 10/25") <= 1  # redrawn in place, not a line for each step
    assert "\x1b[" in text
    assert "saved" in text


def test_terminal_keeps_a_line_for_every_skipped_step() -> None:
    target, stream = console(terminal=True)
    with Progress(25, is_main=True, console=target) as progress:
        progress.update(at(5, skipped="loss is inf"))
        for step in range(6, 26):
            progress.update(at(step))
    assert "SKIPPED: loss is inf" in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_are_silent(terminal: bool) -> None:
    target, stream = console(terminal=terminal)
    with Progress(25, is_main=False, console=target) as progress:
        progress.update(at(25))
        progress.note("text")
    assert stream.getvalue() == ""
