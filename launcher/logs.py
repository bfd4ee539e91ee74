"""`logs`: show the newest log of a run, and follow it from life to life."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from launcher.find_runs import named_run
from launcher.log_reader import LogTail, log_of_job, newest_log
from launcher.run_folder import RunRecord
from launcher.run_reader import read_run
from launcher.run_state import RunState
from launcher.slurm_queue import JOB_ID, SlurmQueue
from launcher.status import state_of
from launcher.table import printable
from mpotrain.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError

POLL_SECONDS = 1.0
STATE_SECONDS = 15.0
"""Time between two questions to the queue while nothing is written."""
END_LOOKS = 2
"""Times that a run must be seen to have ended: between two jobs of a run there is a moment in
which the old one is gone, and the new one is not yet written down."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `logs`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or the file of a run")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="wait for more until the run has ended"
    )
    parser.add_argument("--job", metavar="ID", help="the log of this job instead of the newest")
    parser.add_argument(
        "--lines", type=int, default=40, metavar="N", help="last lines to begin with (default: 40)"
    )


def main(options: argparse.Namespace) -> int:
    """Print the end of a log, and follow it if asked to.

    Args:
        options: see `add_arguments`.

    Returns:
        The exit code: 2 where there is no log.

    Raises:
        ConfigError: there is no such run, job or log.
    """
    folder = named_run(options.run)
    if options.lines < 0:
        raise ConfigError([f"--lines: must not be negative, is {options.lines}"])
    if options.job is not None and JOB_ID.fullmatch(options.job) is None:
        raise ConfigError([f"--job: {options.job!r} is no job id such as 123 or 123_4"])
    follower = LogFollower(folder, options.job, options.lines, SlurmQueue(), sys.stdout.buffer)
    try:
        return follower.follow() if options.follow else follower.show()
    except KeyboardInterrupt:
        return EXIT_DONE
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise ConfigError([f"{error.filename or folder}: cannot be read ({error})"]) from error


@dataclass
class LogFollower:
    """Shows the log of a run, and goes on to the next one when a new job takes over.

    Attributes:
        folder: run folder.
        job_id: show this job alone; None: always the newest.
        num_lines: last lines to begin with.
        queue: of the cluster.
        out: where to.
        note: shows a line of our own, beside the log.
        sleep: waits.
        clock: monotonic time in seconds.
    """

    folder: Path
    job_id: str | None
    num_lines: int
    queue: SlurmQueue
    out: BinaryIO
    note: Callable[[str], None] = field(default=lambda text: _to_stderr(text))
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _tail: LogTail | None = None
    _next_look: float = 0.0
    _ends_seen: int = 0
    _last_note: str = ""

    def show(self) -> int:
        """Print the end of the log."""
        record = read_run(self.folder)
        if not self._turn_to(self._path(record)):
            raise ConfigError([f"{self.folder}: no log yet: {self._why_none(record)}"])
        self._drain()
        return EXIT_DONE

    def follow(self) -> int:
        """Print the log as it grows, until the run (or the one job) has ended."""
        self._next_look = self.clock()
        while True:
            record = read_run(self.folder)
            if not self._turn_to(self._path(record)) and self._tail is None:
                self._note_once(self._why_none(record))
            ended = self._has_ended(record)
            # After the verdict, so that what was written just before the end is shown.
            if self._drain():
                self._ends_seen = 0
            elif ended:
                return EXIT_DONE if self._tail is not None else EXIT_BAD_INPUT
            self.sleep(POLL_SECONDS)

    def _path(self, record: RunRecord) -> Path | None:
        if self.job_id is None:
            return newest_log(record)
        path = log_of_job(record, self.job_id)
        return path if path.exists() else None

    def _turn_to(self, path: Path | None) -> bool:
        """Go on with another log if `path` is another; whether there is one."""
        if path is None:
            return False
        if self._tail is None:
            self._tail = LogTail(path, self.num_lines)
        elif path != self._tail.path:
            self._drain()
            self._tail = LogTail(path, None)
        else:
            return True
        self.note(f"==> {path} <==")
        return True

    def _drain(self) -> bool:
        """Print all that is new; whether there was anything."""
        any_new = False
        while self._tail is not None and (data := self._tail.read()):
            self.out.write(data)
            any_new = True
        self.out.flush()
        return any_new

    def _has_ended(self, record: RunRecord) -> bool:
        """Whether the run has ended, asked for now and then."""
        if self.clock() < self._next_look:
            return self._ends_seen >= END_LOOKS
        state = self._state(record)
        job_gone = self.job_id is not None and state.job is None and state.word != "unknown"
        self._ends_seen = self._ends_seen + 1 if state.has_ended or job_gone else 0
        # A first sign of the end is looked at again soon.
        self._next_look = self.clock() + (POLL_SECONDS if self._ends_seen else STATE_SECONDS)
        return self._ends_seen >= END_LOOKS

    def _state(self, record: RunRecord) -> RunState:
        if self.job_id is not None:
            record = replace(record, job_ids=(self.job_id,))
        return state_of(record, self.queue.jobs(record.job_ids))

    def _why_none(self, record: RunRecord) -> str:
        if self.job_id is not None:
            return f"job {self.job_id} has written none into {self.folder}"
        state = self._state(record)
        return f"the run is {state.word}{f' ({state.detail})' if state.detail else ''}"

    def _note_once(self, text: str) -> None:
        if text != self._last_note:
            self._last_note = text
            self.note(text)


def _to_stderr(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()
