"""What one life reads from the run folder and writes into it, on a disk that fails for a while.

A life must not be lost for a line of its log: a line that cannot be written waits for the next
one. Nor must a failed life be forgotten, or a run that always fails would start for ever. So
`catch_up` says whether all is on record before the next life is asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.allocation import Allocation
from launcher.life_log import (
    Event,
    LifeLog,
    Record,
    RunOutcome,
    forget_outcome,
    newest_step,
    read_outcome,
)
from launcher.run_folder import OUTCOME_FILE
from mpotrain.errors import StorageError
from mpotrain.train.signals import STOP_FILE

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 5.0
"""Between two attempts."""
BEGIN_ATTEMPTS = 3
"""For what a life begins with: ranks shall not wait long for a line."""
PATIENT_ATTEMPTS = 120
"""Where nothing sound can be done without the file: ten minutes, as for a controller."""


class Journal:
    """The run folder as the supervisor of one life uses it.

    Attributes:
        log: `lives.jsonl`.
        life: number of the life.
        keeps_stop_file: whether a later life of the job may have begun that has to obey it too.
    """

    def __init__(
        self, run_folder: Path, allocation: Allocation, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            run_folder: the run folder.
            allocation: the job.
            sleep: how to wait.
        """
        self.log, self.life = LifeLog(run_folder), 0
        self.keeps_stop_file = False
        self._folder, self._allocation, self._sleep = run_folder, allocation, sleep
        self._waiting: list[dict[str, Any]] = []
        self._old_outcome: tuple[int, int] | None = None
        self._ignores_outcomes = False

    def records(self) -> list[Record]:
        """Return the lines of all lives, with patience: whoever does not know them may do harm.

        Raises:
            StorageError: the file could not be read for ten minutes.
        """
        for _ in range(PATIENT_ATTEMPTS - 1):
            try:
                return self.log.records()
            except StorageError as error:
                logger.warning("%s: tried again", error)
                self._sleep(PAUSE_SECONDS)
        return self.log.records()

    def record(self, event: Event, detail: str, **more: Any) -> None:
        """Add a line; where it cannot be written it waits for the next one.

        Args:
            event: what happened.
            detail: in words.
            more: further entries.
        """
        self._note(event, detail, more)
        self.catch_up(attempts=1)

    def begin(self, step: int | None, detail: str, **more: Any) -> None:
        """Claim the life, and let nothing that an earlier start has left count for it.

        Args:
            step: newest complete checkpoint.
            detail: in words.
            more: further entries.
        """
        self._note("started", detail, {**more, "step": step})
        self.catch_up(BEGIN_ATTEMPTS)
        for attempt in range(BEGIN_ATTEMPTS):
            try:
                forget_outcome(self._folder)
                return
            except StorageError as error:
                logger.warning("%s", error)
                if attempt < BEGIN_ATTEMPTS - 1:
                    self._sleep(PAUSE_SECONDS)
        logger.warning("the outcome of an earlier start cannot be deleted: it is passed over")
        self._ignores_outcomes = True
        self._old_outcome = self._outcome_file()

    def catch_up(self, attempts: int = PATIENT_ATTEMPTS) -> bool:
        """Write the lines that wait; return whether all are on record.

        Args:
            attempts: how often to try, five seconds apart.
        """
        for attempt in range(attempts):
            try:
                while self._waiting:
                    self.log.append(**self._waiting[0])
                    del self._waiting[0]
                return True
            except StorageError as error:
                logger.warning("%s; the line waits: %s", error, self._waiting[0]["event"])
                if attempt < attempts - 1:
                    self._sleep(PAUSE_SECONDS)
        return False

    def outcome(self) -> RunOutcome | None:
        """Return what rank 0 says of its end in this life, None where it says nothing."""
        if self._ignores_outcomes:
            there = self._outcome_file()
            old = self._old_outcome
            # Rank 0 writes a new file. Where nothing is known of the old one, none is believed.
            if old is None or there is None or there == old:
                return None
        return read_outcome(self._folder)

    def stop_file_is_there(self) -> bool:
        """Whether somebody has asked the run to stop."""
        try:
            return (self._folder / STOP_FILE).exists()
        except OSError as error:
            logger.warning("the stop file cannot be looked for: %s", error)
            return False

    def obey_stop_file(self) -> bool:
        """Delete the stop file: the run has obeyed it, so the next start shall not.

        Returns:
            Whether it is gone.
        """
        path = self._folder / STOP_FILE
        if self.keeps_stop_file:
            logger.warning(
                "%s stays: SLURM does not say whether it has started the job again; delete it "
                "before you start the run anew",
                path,
            )
            return False
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the stop file cannot be deleted, delete it: %s", error)
            return False
        return True

    def _note(self, event: Event, detail: str, more: dict[str, Any]) -> None:
        line = {
            "event": event,
            "job_id": self._allocation.job_id,
            "life": self.life,
            "step": newest_step(self._folder),
            "nodes": self._allocation.nodes,
            "detail": detail,
            "more": {"time": time.time(), **more},
        }
        self._waiting.append(line)

    def _outcome_file(self) -> tuple[int, int] | None:
        """Return what tells one outcome file from the next."""
        try:
            found = (self._folder / OUTCOME_FILE).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns
