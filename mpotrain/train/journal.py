"""The file `metrics.jsonl`: one JSON object per line, without duplicates after a resume (no torch).

JSON knows neither NaN nor infinity: they stand as the strings "nan", "inf" and "-inf", which
`float()` and `read_metrics` turn back into numbers. Every line has `step` (steps done when it was
written, hence 1 for the first step), `kind` and `time` (seconds since 1970).
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpotrain.errors import StorageError

JOURNAL_FILE = "metrics.jsonl"
"""Name of the file in the run folder."""

_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Journal:
    """Appends lines to a journal that it has first cut back to a step.

    Opening drops every line of a step after `resume_step` (a run that died after its last
    checkpoint does these steps again) and every line that is torn or no record. The cut is a new
    file renamed into place, so that a kill in the middle loses nothing.

    Attributes:
        path: the file.
        num_dropped: lines that opening has dropped.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """Open the journal for appending.

        Args:
            path: the file; its folder must exist.
            resume_step: step from which the run goes on; None starts an empty journal.

        Raises:
            StorageError: the file cannot be read or written.
        """
        self.path = path
        self.num_dropped = 0
        try:
            if path.exists():
                self.num_dropped = _cut_back(path, resume_step)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StorageError(f"{path}: cannot be opened for writing ({error})") from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; it is complete on return, or not there at all.

        Raises:
            StorageError: the disk is full or the file is gone. What was written before is whole.
        """
        line = json.dumps(plain_json(record), allow_nan=False) + "\n"
        data = line.encode()
        length = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, data)
            if written != len(data):
                raise OSError(f"only {written} of {len(data)} bytes could be written")
        except OSError as error:
            # Half a line would swallow the next one, once there is room again.
            os.ftruncate(self._descriptor, length)
            raise StorageError(
                f"{self.path}: a line of metrics cannot be written ({error})"
            ) from error

    def sync(self) -> None:
        """Wait until all lines are on the disk.

        Raises:
            StorageError: the system reports that they are not.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be synced to disk ({error})") from error

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read a journal, with NaN and infinity as floats again.

    Args:
        path: the file, or the run folder that holds it.
        kind: return only lines of this kind ("train", "eval", ...).

    Returns:
        The records in the order of writing. A torn last line of a running or killed process and
        other lines that are no records are left out.

    Raises:
        StorageError: the file cannot be read.
    """
    file = path / JOURNAL_FILE if path.is_dir() else path
    try:
        content = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error})") from error
    records = [_with_floats(record) for _, record in _records(content) if record is not None]
    return [record for record in records if kind is None or record.get("kind") == kind]


def plain_json(value: Any) -> Any:
    """Return `value` with NaN and infinity as strings, and tuples as lists, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return value


def _with_floats(value: Any) -> Any:
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    return value


def _records(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield every line with its record, or None where it is torn or no record."""
    for line in content.splitlines(keepends=True):
        record = None
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
        whole = isinstance(record, dict) and isinstance(record.get("step"), int)
        yield line, record if whole else None


def _cut_back(path: Path, resume_step: int | None) -> int:
    """Drop lines after `resume_step` and lines that are no records; return their number."""
    lines = list(_records(path.read_bytes()))
    kept = [
        line
        for line, record in lines
        if record is not None and resume_step is not None and record["step"] <= resume_step
    ]
    if len(kept) == len(lines):
        return 0
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return len(lines) - len(kept)
