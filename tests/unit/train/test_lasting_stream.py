"""Output whose reader is gone: silence, and no error of a run that goes on."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import pytest
from rich.console import Console

from mpotrain.train.lasting_stream import LastingStream
from mpotrain.train.progress import Progress, StepReport


@pytest.fixture(params=["terminal", "pipe"])
def stream(request: pytest.FixtureRequest) -> Iterator[tuple[int, TextIO]]:
    """The end that reads, and a stream like standard error: each line is written at once."""
    reader, writer = os.openpty() if request.param == "terminal" else os.pipe()
    with os.fdopen(writer, "w", buffering=1) as stream:
        yield reader, stream


def test_a_reader_that_has_left_is_no_error(stream: tuple[int, TextIO]) -> None:
    reader, behind = stream
    lasting = LastingStream(behind)
    assert (lasting.isatty(), lasting.fileno()) == (behind.isatty(), behind.fileno())
    lasting.write("seen\n")
    assert os.read(reader, 100).split() == [b"seen"]
    os.close(reader)
    for _ in range(3):
        assert lasting.write("unseen\n") == len("unseen\n")
        lasting.flush()
    # What the failed write has left in the buffer fails nobody who flushes it at the end.
    behind.flush()


def test_a_run_goes_on_when_nobody_sees_it(
    stream: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, behind = stream
    monkeypatch.setattr("sys.stderr", behind)
    with Progress(3, is_main=True, every=1) as progress:
        os.close(reader)
        for step in (1, 2, 3):
            progress.update(StepReport(step=step, loss=1.0, lr=0.1, grad_norm=1.0))
            progress.note("a line")


def test_without_standard_error_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with Progress(3, is_main=True, every=1) as progress:
        progress.note("a line")


def test_other_errors_are_told() -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        console = Console(file=cast("TextIO", LastingStream(full)))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            console.print("a line")
        # The buffer would fail once more while it is closed.
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), full.fileno())
