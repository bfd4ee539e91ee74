"""The logs of a run: which is the newest, and what is new in it."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.file_ends import offset_of_last_lines
from launcher.run_folder import RunRecord
from launcher.slurm_names import LOGS, log_path

CHUNK_BYTES = 1 << 20
"""Most that is read at a time."""


def newest_log(record: RunRecord) -> Path | None:
    """Return the log of the newest job of a run; None where there is none.

    A job counts from the start of its newest life, not from the last line in its log: the log of
    a job that has ended may get late lines, when the next has long begun.

    Args:
        record: the run.
    """
    started = {
        life.job_id: life.time
        for life in record.lives
        if life.event == "started" and life.job_id is not None and life.time is not None
    }
    found: list[tuple[float, str, Path]] = []
    try:
        logs = sorted((record.folder / LOGS).glob("*.log"))
    except OSError:
        return None
    for path in logs:
        try:
            changed = path.stat().st_mtime
        except OSError:
            continue
        found.append((started.get(path.stem, changed), path.name, path))
    return max(found)[2] if found else None


def log_of_job(record: RunRecord, job_id: str) -> Path:
    """Return the log of one job, which may not exist.

    Args:
        record: the run.
        job_id: as SLURM prints it, `123` or `123_4`.
    """
    return log_path(record.folder, job_id)


class LogTail:
    """Reads a growing file from its last lines on.

    A file that has become shorter, or was replaced, is read anew from its start.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, num_lines: int | None) -> None:
        """Find the place to start from.

        Args:
            path: the file.
            num_lines: begin with so many of its last lines; None begins at the start.

        Raises:
            OSError: the file cannot be read.
        """
        self.path = path
        self._offset = 0 if num_lines is None else offset_of_last_lines(path, num_lines)
        self._inode = path.stat().st_ino

    def read(self) -> bytes:
        """Return what is new, at most `CHUNK_BYTES`; empty where nothing is.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                self._catch_up(file.fileno())
                file.seek(self._offset)
                data = file.read(CHUNK_BYTES)
        except FileNotFoundError:
            return b""  # moved away; the next one of this name is read from its start
        self._offset += len(data)
        return data

    def _catch_up(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._inode, self._offset = status.st_ino, 0
