"""How a start of a run ended, on record in the run folder for those who decide on (no torch).

Exit codes of many ranks are no reliable message: launchers have codes of their own, and srun
returns the highest. A batch script reads this file.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpotrain.checkpoint.lock import FolderLock
from mpotrain.durable import write_durably
from mpotrain.errors import EXIT_ANOMALY, EXIT_BAD_INPUT, CheckpointError, StorageError

OUTCOME_FILE = "outcome.json"
"""Name of the record in the run folder; absent while a run goes on and after it was killed."""
FAILED = "failed"
"""Outcome of a start that ended with an error; the others are those of `train.state.Outcome`."""
LOST_RANK = "LOST_RANK"
"""Reason: another rank failed, was killed or is cut off."""
HUNG = "HUNG"
"""Reason: no rank made progress."""


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How a start ended.

    Attributes:
        outcome: `done`, `held`, `resume` or `failed`.
        detail: what happened, for people.
        exit_code: of the process that wrote this.
        reason: name of a `StopReason`, `LOST_RANK` or `HUNG`; None where there is no more to say.
        step: steps done; None where that is not known.
    """

    outcome: str
    detail: str
    exit_code: int
    reason: str | None = None
    step: int | None = None

    @property
    def retry(self) -> bool:
        """Whether another start may help: not where the run itself is wrong, and not at its end."""
        if self.outcome == FAILED:
            return self.exit_code not in (EXIT_BAD_INPUT, EXIT_ANOMALY)
        return self.outcome == "resume"


class EndRecord:
    """Writes how one start ended, once, whichever thread comes first."""

    def __init__(self, run_folder: Path, checkpoints: Path) -> None:
        """Name the places; nothing is written yet.

        Args:
            run_folder: folder of the run.
            checkpoints: folder whose lock says that a live process writes there.
        """
        self._folder, self._checkpoints = run_folder, checkpoints
        self._lock = threading.Lock()
        self._is_written = False

    def write(self, end: RunEnd, *, begun: bool) -> None:
        """Write the end of this start; a second one changes nothing.

        A start that was refused before it touched the run speaks only for itself: where the run
        is at its end, or another process trains it, or where there is no run folder, it leaves
        no record.

        Args:
            end: how it ended.
            begun: whether this start has touched the run.

        Raises:
            StorageError: the file cannot be written.
        """
        with self._lock:
            if self._is_written:
                return
            if begun:
                record_outcome(self._folder, end)
            elif self._folder.is_dir():
                self._write_refusal(end)
            self._is_written = True

    def _write_refusal(self, end: RunEnd) -> None:
        before = read_outcome(self._folder) or {}
        if before.get("outcome") in ("done", "held"):
            return
        lock = FolderLock(self._checkpoints)
        try:
            if self._checkpoints.is_dir():
                lock.acquire()
            record_outcome(self._folder, end)
        except CheckpointError:
            pass  # another process trains this run: it will say how that ends
        except OSError as error:
            raise StorageError(f"{self._checkpoints}: cannot be locked ({error})") from error
        finally:
            lock.release()


def record_outcome(folder: Path, end: RunEnd) -> None:
    """Write how a start ended into its run folder.

    Raises:
        StorageError: the file cannot be written.
    """
    content = {
        "outcome": str(end.outcome),
        "detail": end.detail,
        "reason": end.reason,
        "exit_code": end.exit_code,
        "step": end.step,
        "retry": end.retry,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / OUTCOME_FILE, (json.dumps(content) + "\n").encode())
    except OSError as error:
        raise StorageError(f"{folder / OUTCOME_FILE}: cannot be written ({error})") from error


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """Return the record in a run folder; None where there is none that can be read."""
    try:
        content = json.loads((folder / OUTCOME_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
