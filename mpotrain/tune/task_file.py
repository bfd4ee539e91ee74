"""Examples of a task, read from a tab-separated file line by line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpotrain.data.manifest import file_digest
from mpotrain.errors import DataError
from mpotrain.tune.tasks import TaskFormat

SHOWN = 5
"""Number of bad lines that a message lists before it counts the rest."""


@dataclass(frozen=True)
class Examples:
    """What a file holds.

    Attributes:
        path: the file.
        digest: xxh3-128 of its bytes.
        texts: first text of each example.
        pairs: second text of each example; None where the task has one text.
        labels: number of the class (int64) or value (float32) of each example, (N,).
        num_bad: unreadable lines that were left out.
    """

    path: Path
    digest: str
    texts: list[str]
    pairs: list[str] | None
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    num_bad: int

    def __len__(self) -> int:
        return len(self.texts)


def read_task_file(path: Path, form: TaskFormat, max_bad_lines: int = 0) -> Examples:
    """Read all examples of a file.

    Nothing is quoted: a field is what stands between two tabs, a line what stands between two line
    feeds (with or without a carriage return).

    Args:
        path: UTF-8 text, with or without a byte order mark.
        form: its columns and classes.
        max_bad_lines: lines that may be unreadable and are left out then.

    Raises:
        DataError: the file is missing or no text, lacks a column, holds more bad lines (each is
            named with what is wrong), or no example at all.
    """
    lines = _lines(path)
    first = 0
    names: Sequence[str] = form.columns or ()
    if form.columns is None:
        names, first = (lines[0].split("\t") if lines else []), 1
        _require_columns(path, names, form)
    places = [names.index(column) for column in form.wanted]
    rows, bad = [], []
    for number, line in enumerate(lines[first:], start=first + 1):
        fields = line.split("\t")
        problem = _line_problem(fields, names, form)
        if problem is not None:
            bad.append(f"{path}: line {number}: {problem}")
        else:
            rows.append([fields[place] for place in places])
    if len(bad) > max_bad_lines:
        raise DataError(_bad_lines_text(path, bad, max_bad_lines))
    if not rows:
        raise DataError(f"{path}: holds no example")
    return Examples(
        path=path,
        digest=file_digest(path),
        texts=[row[0] for row in rows],
        pairs=None if form.pair is None else [row[1] for row in rows],
        labels=_labels([row[-1] for row in rows], form),
        num_bad=len(bad),
    )


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error}") from error
    # Not splitlines(): it also ends a line at characters that stand inside of texts (U+0085).
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _require_columns(path: Path, names: Sequence[str], form: TaskFormat) -> None:
    missing = [column for column in form.wanted if column not in names]
    if missing:
        wanted = " and no column ".join(repr(column) for column in missing)
        shown = ", ".join(repr(name[:30]) for name in names[:12]) or "nothing"
        raise DataError(
            f"{path}: line 1: no column {wanted}; it names {shown}. Is it the file of another "
            "task, or a test file without labels?"
        )
    twice = [column for column in form.wanted if list(names).count(column) > 1]
    if twice:
        raise DataError(f"{path}: line 1: names {twice[0]!r} twice")


def _line_problem(fields: list[str], names: Sequence[str], form: TaskFormat) -> str | None:
    """Say what is wrong with a line, None where nothing is."""
    if len(fields) != len(names):
        return f"has {len(fields)} columns instead of {len(names)}"
    label = fields[names.index(form.label)]
    if not form.is_regression:
        known = ", ".join(form.labels)
        return None if label in form.labels else f"{form.label} is {label!r}, not one of {known}"
    try:
        # Python reads 1_0 as 10.
        is_number = "_" not in label and math.isfinite(float(label))
    except ValueError:
        is_number = False
    return None if is_number else f"{form.label} is {label!r}, not a number"


def _labels(found: list[str], form: TaskFormat) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
    if form.is_regression:
        return np.array([float(label) for label in found], dtype=np.float32)
    classes = {name: number for number, name in enumerate(form.labels)}
    return np.array([classes[label] for label in found], dtype=np.int64)


def _bad_lines_text(path: Path, bad: list[str], allowed: int) -> str:
    lines = bad[:SHOWN]
    if len(bad) > SHOWN:
        lines.append(f"{path}: ... and {len(bad) - SHOWN} more bad lines")
    hint = f"task.max_bad_lines={len(bad)} leaves them out"
    return "\n".join([*lines, f"{path}: {len(bad)} bad line(s), {allowed} allowed; {hint}"])
