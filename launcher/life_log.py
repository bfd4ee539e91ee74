"""The memory of a run over its lives: `lives.jsonl`, checkpoints and the outcome file (no torch).

Jobs come and go, and may end at any instant without a word; what a later life must know stands in
the run folder. Every line is appended in one write and forced to disk.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.run_folder import CHECKPOINTS, LAUNCH, LIVES_FILE, OUTCOME_FILE
from mpotrain.checkpoint.folders import published
from mpotrain.checkpoint.manifest_file import read_manifest
from mpotrain.durable import storage_errors
from mpotrain.errors import CheckpointError, StorageError

Event = Literal[
    "submitted", "started", "preflight", "warned", "ended", "requeued", "resubmitted", "stopped",
    "gave_up", "done",
]  # fmt: skip
"""submitted: a person asked for the run. started: a life began. preflight: nodes were checked.
warned: a signal came. ended: the ranks are gone. requeued, resubmitted: another life was asked for.
stopped: the stop file kept a life from its start. gave_up: no other life was asked for. done: the
run has come to its end."""

Record = Mapping[str, Any]
"""One line of the file."""


@dataclass(frozen=True)
class RunOutcome:
    """What rank 0 says of the end of a start: `outcome.json`.

    Attributes:
        outcome: "done", "held", "resume" or "failed".
        detail: in words.
        reason: why the ranks stopped, where they did so before the end.
        exit_code: of rank 0.
        step: finished steps, where known.
        retry: whether another start may help.
    """

    outcome: str
    detail: str = ""
    reason: str | None = None
    exit_code: int | None = None
    step: int | None = None
    retry: bool = True


class LifeLog:
    """Reads and appends the lines of one run.

    Attributes:
        path: the file.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / LAUNCH / LIVES_FILE

    def append(
        self,
        event: Event,
        *,
        job_id: str,
        life: int,
        step: int | None = None,
        nodes: Sequence[str] = (),
        detail: str = "",
        more: Mapping[str, Any] | None = None,
    ) -> Record:
        """Add a line, durably.

        Args:
            event: what happened.
            job_id: the job of the life.
            life: number of the life.
            step: newest complete checkpoint.
            nodes: nodes of the job, or those that the event is about.
            detail: in words.
            more: further entries.

        Returns:
            The line.

        Raises:
            StorageError: it could not be written, or is not known to have reached the disk.
        """
        line = {
            "time": time.time(),
            "job_id": job_id,
            "life": life,
            "event": event,
            "step": step,
            "nodes": list(nodes),
            "detail": detail,
            **(more or {}),
        }
        data = json.dumps(line).encode() + b"\n"
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                # A line that a power cut tore must not swallow this one.
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    data = b"\n" + data
                _write_whole(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return line

    def records(self) -> list[Record]:
        """Return all sound lines, oldest first; torn and foreign ones are passed over.

        Raises:
            StorageError: there is a file, but it cannot be read.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"{self.path}: cannot be read ({reason})") from error
        found: list[Record] = []
        for text in data.split(b"\n"):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and isinstance(line.get("event"), str):
                found.append(line)
        return found


def newest_step(run_folder: Path) -> int | None:
    """Return the step of the newest complete checkpoint, None where there is none.

    A checkpoint without a sound manifest is passed over; data files are not read.

    Args:
        run_folder: the run folder.
    """
    try:
        candidates = published(run_folder / CHECKPOINTS)
    except OSError:
        return None
    for step, folder in candidates.items():
        try:
            read_manifest(folder)
        except CheckpointError:
            continue
        return step
    return None


def read_outcome(run_folder: Path) -> RunOutcome | None:
    """Return what rank 0 says of its last start, None where it says nothing that can be read.

    Args:
        run_folder: the run folder.
    """
    try:
        found = json.loads((run_folder / OUTCOME_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("outcome"), str):
        return None
    reason, code, step = found.get("reason"), found.get("exit_code"), found.get("step")
    return RunOutcome(
        outcome=found["outcome"],
        detail=str(found.get("detail") or ""),
        reason=reason if isinstance(reason, str) else None,
        exit_code=code if isinstance(code, int) else None,
        step=step if isinstance(step, int) else None,
        retry=found.get("retry") is not False,
    )


def forget_outcome(run_folder: Path) -> None:
    """Delete the outcome of an earlier start, so that it is not taken for that of the next.

    Raises:
        StorageError: it cannot be deleted.
    """
    path = run_folder / OUTCOME_FILE
    with storage_errors(path):
        path.unlink(missing_ok=True)


def _write_whole(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    if written != len(data):
        raise OSError(f"only {written} of {len(data)} bytes fitted on the disk")
