"""`cancel`: take runs out of the queue, by default with a checkpoint first.

A supervisor may be about to requeue or resubmit the run in the very moment that it is cancelled.
So the stop file comes first: a life that begins after it ends at its first step, and no supervisor
goes on from a life that it has stopped. Then jobs are cancelled, and looked up again until the
queue holds none that could still begin a life, those included that a supervisor has submitted
meanwhile and had no time to write down.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.find_runs import find_runs, named_run
from launcher.run_folder import RunRecord
from launcher.run_reader import read_run
from launcher.run_state import active_jobs
from launcher.slurm_names import LOGS
from launcher.slurm_queue import QueuedJob, SlurmError, SlurmQueue
from launcher.status import state_of
from launcher.stop import request_stop, withdraw_stop
from launcher.table import printable
from mpotrain.errors import EXIT_CRASH, EXIT_DONE, ConfigError

POLL_SECONDS = 1.0
MAX_POLL_SECONDS = 5.0
"""Pauses between looks at the queue grow from the one to the other: others need it too."""
SETTLE_SECONDS = 90.0
"""How long jobs may take to leave: SIGTERM, KillWait (30 s by default), the epilog."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cancel`."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, or files of runs"
    )
    parser.add_argument(
        "--now", action="store_true", help="kill running jobs (scancel) without a checkpoint"
    )
    parser.add_argument(
        "--recursive", action="store_true", help="all runs below the folders, such as a sweep's"
    )


def main(options: argparse.Namespace) -> int:
    """Cancel all runs that were named.

    Args:
        options: see `add_arguments`.

    Returns:
        The exit code: 1 if a job may still be there.

    Raises:
        ConfigError: a run does not exist, or there is none below a folder.
        StorageError: a stop file cannot be written.
    """
    if options.recursive:
        folders, clean = _runs_below(options.runs)
    else:
        folders, clean = [named_run(path) for path in options.runs], True
    for folder in folders:
        clean &= Cancellation(folder, SlurmQueue(), now=options.now).carry_out()
    return EXIT_DONE if clean else EXIT_CRASH


def _runs_below(roots: list[Path]) -> tuple[list[Path], bool]:
    """Return all runs in and below some folders, and whether all of these could be searched."""
    searches = {root: find_runs([root]) for root in roots}
    if empty := [root for root, found in searches.items() if not found.folders]:
        notes = [note for root in empty for note in searches[root].notes]
        raise ConfigError([f"{root}: holds no run; nothing to cancel" for root in empty] + notes)
    found = find_runs(roots)
    for note in found.notes:
        print_line(note)
    return list(found.folders), not found.notes


def print_line(text: str) -> None:
    """Print a line at once, without control characters."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


@dataclass
class Cancellation:
    """Takes one run out of the queue.

    Attributes:
        folder: run folder.
        queue: of the cluster.
        now: kill running jobs.
        say: shows a line.
        sleep: waits.
        clock: monotonic time in seconds.
    """

    folder: Path
    queue: SlurmQueue
    now: bool
    say: Callable[[str], None] = print_line
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _told: set[str] = field(default_factory=set)

    def carry_out(self) -> bool:
        """Ask the run to stop, cancel its jobs, and watch them go; whether all went well."""
        record = read_run(self.folder)
        answer = self.queue.jobs(record.job_ids)
        if not answer.known:
            return self._carry_out_unseen(record, answer.problem)
        state = state_of(record, answer)
        if state.word == "damaged":
            request_stop(self.folder, "cancel")
            self._tell(
                f"{state.detail}; so its jobs are not known: look for them with squeue. The stop "
                "file is written, so that the run ends at its next step"
            )
            return False
        if not active_jobs(record, answer) and state.word != "running":
            # No job: a stop file would only stop the next start.
            self._tell(f"is {state.word}; nothing to cancel")
            return True
        request_stop(self.folder, "cancel")
        if not record.job_ids:
            self._tell("is no batch job; it saves a checkpoint after the step it is at, and ends")
            return True
        try:
            left = self._clear()
        except SlurmError as error:
            self._tell(f"{error}; the stop file stays, so that the run ends at its next step")
            return False
        return self._conclude(left)

    def _clear(self) -> list[QueuedJob]:
        """Cancel until nothing more has to be; return the jobs that are left."""
        deadline, pause = self.clock() + SETTLE_SECONDS, POLL_SECONDS
        while True:
            jobs = self._jobs()
            doomed = jobs if self.now else [job for job in jobs if job.is_waiting]
            dependents = self.queue.dependents([job.job_id for job in jobs]) if jobs else []
            # Those that wait for it first: a run that ends well in this moment would start them.
            waited = "waits for the good end of this run: cancelled"
            self._cancel(dependents, waited, waiting_only=True)
            names = [job.job_id for job in doomed]
            self._cancel(names, "cancelled", waiting_only=not self.now)
            unsettled = [job for job in jobs if self.now or not job.is_running]
            if not unsettled or self.clock() >= deadline:
                return jobs
            self.sleep(pause)
            pause = min(2 * pause, MAX_POLL_SECONDS)

    def _jobs(self) -> list[QueuedJob]:
        """Return the jobs of the run that can still do something, unrecorded ones included."""
        record = read_run(self.folder)
        answer = self.queue.jobs(record.job_ids)
        if not answer.known:
            raise SlurmError(answer.problem)
        jobs = active_jobs(record, answer)
        known = {job.job_id for job in answer.jobs.values()} | set(record.job_ids)
        for name in sorted({job.name for job in answer.jobs.values()} - {""}):
            for job in self.queue.named(name):
                if job.job_id not in known and job.is_active and self._is_ours(job.job_id):
                    jobs.append(job)
        return jobs

    def _is_ours(self, job_id: str) -> bool:
        """Whether a job of the same name writes its log into this run folder."""
        try:
            log = self.queue.log_of(job_id)
        except SlurmError:
            return False  # it has ended in this moment
        return log is not None and log.parent.resolve() == (self.folder / LOGS).resolve()

    def _cancel(self, job_ids: list[str], what: str, *, waiting_only: bool) -> None:
        self.queue.cancel(job_ids, waiting_only=waiting_only)
        for job_id in job_ids:
            self._tell(f"job {job_id} {what}")

    def _conclude(self, left: list[QueuedJob]) -> bool:
        running = [job for job in left if job.is_running]
        if not self.now and running:
            for job in running:
                self._tell(
                    f"job {job.job_id} saves a checkpoint after the step it is at, and ends; "
                    "follow it with `logs -f`, or end it at once with `cancel --now`"
                )
            return len(running) == len(left)
        if left:
            states = ", ".join(f"{job.job_id} is {job.state}" for job in left)
            self._tell(f"{states} after {SETTLE_SECONDS:g} s; the stop file stays")
            return False
        # Nobody is left to obey and delete it; the next start shall not.
        withdraw_stop(self.folder)
        return True

    def _carry_out_unseen(self, record: RunRecord, problem: str) -> bool:
        """Do what can be done without an answer of the queue."""
        if record.outcome is not None and record.outcome.is_final:
            self._tell(f"is {record.outcome.outcome}; nothing to cancel")
            return True
        request_stop(self.folder, "cancel")
        self._tell(f"{problem}; the stop file is written, so that the run ends at its next step")
        if self.now and record.job_ids:
            try:
                self.queue.cancel(list(record.job_ids[-1:]))
                self._tell(f"job {record.job_ids[-1]}: scancel was sent; see `status` later")
            except SlurmError as error:
                self._tell(str(error))
        return False

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.say(f"{self.folder}: {text}")
