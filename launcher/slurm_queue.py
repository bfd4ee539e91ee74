"""What SLURM's queue says of jobs, and how jobs are taken out of it.

The commands are run as argument lists, never through a shell, with a time limit: a controller that
does not answer must not hang a person's terminal.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

JOB_ID = re.compile(r"\d+(_\d+)?")
"""A job, or one task of a job array (`123_4`)."""

TIMEOUT_SECONDS = 20.0
"""How long a SLURM command may take; a busy controller answers within seconds."""

RUNNING_STATES = frozenset(
    {"RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
)
"""The job holds nodes."""
WAITING_STATES = frozenset(
    {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)
"""The job waits for nodes."""
ENDING_STATES = frozenset({"COMPLETING"})
"""The job leaves its nodes: it is over, or back in the queue in a moment (SLURM does not say)."""

_FIELDS = "%i|%A|%T|%j|%N|%r"
_DEPENDENCY_FIELDS = "%i|%A|%E"
_UNKNOWN_JOB = "Invalid job id"
_GONE = ("already completing or completed", _UNKNOWN_JOB)


@dataclass(frozen=True)
class QueuedJob:
    """A job that the controller knows; ended jobs are remembered for some minutes.

    Attributes:
        job_id: as people write it, `123` or `123_4`.
        state: in SLURM's words, `PENDING`, `RUNNING`, `COMPLETED`, ...
        name: of the job.
        nodes: where it runs, in SLURM's short form (`node[1-4]`); empty while it waits.
        reason: why it waits, or ended.
    """

    job_id: str
    state: str
    name: str = ""
    nodes: str = ""
    reason: str = ""

    @property
    def is_running(self) -> bool:
        """Whether it holds nodes."""
        return self.state in RUNNING_STATES

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for nodes."""
        return self.state in WAITING_STATES

    @property
    def is_active(self) -> bool:
        """Whether it can still do something."""
        return self.is_running or self.is_waiting or self.state in ENDING_STATES


@dataclass(frozen=True)
class QueueAnswer:
    """What the queue said.

    Attributes:
        jobs: by job id; ids that are not in it are not in the queue if `known`.
        known: whether there was an answer at all.
        installed: whether this machine has SLURM's commands.
        problem: why there was no answer.
    """

    jobs: Mapping[str, QueuedJob] = field(default_factory=dict)
    known: bool = True
    installed: bool = True
    problem: str = ""


class SlurmError(Exception):
    """A SLURM command failed, did not answer or is not installed; the text says which."""


class SlurmMissing(SlurmError):  # noqa: N818 - it reads as the state of the machine
    """The command is not installed here."""


class SlurmQueue:
    """The queue of the cluster that this machine belongs to."""

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Remember how long commands may take; nothing is run yet."""
        self._timeout_seconds = timeout_seconds

    def jobs(self, job_ids: Iterable[str]) -> QueueAnswer:
        """Look jobs up, all in one call.

        Args:
            job_ids: jobs and array tasks; malformed ids are passed over.

        Returns:
            Those that the controller knows. Where it could not be asked the answer says so.
        """
        wanted = sorted({job_id for job_id in job_ids if JOB_ID.fullmatch(job_id)})
        if not wanted:
            return QueueAnswer()
        # Without --array the waiting tasks of an array share one line.
        command = ["squeue", "--noheader", "--array", "--states=all", f"--format={_FIELDS}"]
        try:
            text = self._run([*command, f"--jobs={','.join(wanted)}"])
        except SlurmMissing as error:
            return QueueAnswer(known=False, installed=False, problem=str(error))
        except SlurmError as error:
            # Asked for a single job that it has forgotten, squeue fails.
            if _UNKNOWN_JOB in str(error):
                return QueueAnswer()
            return QueueAnswer(known=False, problem=str(error))
        return QueueAnswer(_parse_jobs(text, wanted))

    def dependents(self, job_ids: Iterable[str]) -> list[str]:
        """Return own waiting jobs that can never start if none of these jobs ends well.

        Args:
            job_ids: jobs and array tasks.

        Returns:
            Jobs that wait for the good end of one of them, or of a job that does. Those that wait
            for any end (`afterany`) or for a failure (`afternotok`) may start, and are none.

        Raises:
            SlurmError: the queue cannot be read.
        """
        command = ["squeue", "--me", "--noheader", "--array", "--states=PENDING"]
        text = self._run([*command, f"--format={_DEPENDENCY_FIELDS}"])
        waiting = [line.strip().split("|", 2) for line in text.splitlines() if line.count("|") >= 2]
        reached = set(job_ids)
        given = frozenset(reached)
        grown = True
        while grown:
            found = {
                job_id for job_id, _, dependency in waiting if _needs(dependency, job_id, reached)
            }
            grown = not found <= reached
            reached |= found
        return sorted(reached - given)

    def named(self, name: str) -> list[QueuedJob]:
        """Return own jobs of a name.

        Raises:
            SlurmError: the queue cannot be read.
        """
        command = ["squeue", "--me", "--noheader", "--array", f"--format={_FIELDS}"]
        jobs = _parse_jobs(self._run([*command, f"--name={name}"]), None)
        return list(jobs.values())

    def log_of(self, job_id: str) -> Path | None:
        """Return the file that the batch shell of a job writes into.

        Raises:
            SlurmError: the job is not known.
        """
        text = self._run(["scontrol", "--oneliner", "show", "job", job_id])
        # Values are not quoted: a path ends where the next key begins.
        match = re.search(r"\bStdOut=(.*?)(?: +[A-Z]\w*=|$)", text.strip())
        return Path(match[1]) if match else None

    def cancel(self, job_ids: Sequence[str], *, waiting_only: bool = False) -> None:
        """Take jobs out of the queue; running ones get SIGTERM, and SIGKILL after KillWait.

        Args:
            job_ids: jobs and array tasks; none is an empty request.
            waiting_only: leave alone what has begun to run meanwhile.

        Raises:
            SlurmError: SLURM refused.
        """
        if not job_ids:
            return
        states = ["--state=PENDING"] if waiting_only else []
        try:
            self._run(["scancel", *states, *job_ids])
        except SlurmError as error:
            # A job that ended by itself in this moment is what was wanted.
            if not any(sign in str(error) for sign in _GONE):
                raise

    def _run(self, argv: list[str]) -> str:
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._timeout_seconds,
                env=_environment(),
                check=False,
            )
        except FileNotFoundError as error:
            raise SlurmMissing(f"{argv[0]} is not installed here") from error
        except subprocess.TimeoutExpired as error:
            waited = f"{self._timeout_seconds:g} s"
            raise SlurmError(f"{argv[0]} has not answered within {waited}") from error
        except OSError as error:
            raise SlurmError(f"{argv[0]} cannot be run ({error.strerror or error})") from error
        if done.returncode != 0:
            said = _in_one_line(done.stderr.decode(errors="replace"), argv[0])
            raise SlurmError(f"{argv[0]}: {said or f'exit code {done.returncode}'}")
        return done.stdout.decode(errors="replace")


def _in_one_line(said: str, program: str) -> str:
    """Return what a command says of its failure; of several lines the fatal one is enough."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if f"{program}: fatal:" in line] or lines
    return "; ".join(re.sub(rf"^{program}: (error|fatal): ", "", line) for line in lines)


def _environment() -> dict[str, str]:
    """Return this process's variables without those that filter or reshape squeue's answer."""
    own = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SQUEUE_", "SCANCEL_"))
    }
    return {**own, "LC_ALL": "C"}


def _parse_jobs(text: str, wanted: Sequence[str] | None) -> dict[str, QueuedJob]:
    """Read squeue's lines; an array task is found under both of its ids."""
    found: dict[str, QueuedJob] = {}
    for line in text.splitlines():
        # A name may hold the separator: the two fields after it are counted from the end.
        front = line.strip().split("|", 3)
        back = front[-1].rsplit("|", 2)
        if len(front) < 4 or len(back) < 3:
            continue
        job = QueuedJob(front[0], front[2], *back)
        if wanted is None:
            found[job.job_id] = job
            continue
        found |= {key: job for key in front[:2] if key in wanted}
    return found


def _needs(dependency: str, job_id: str, parents: Iterable[str]) -> bool:
    """Whether a job cannot start without the good end of one of some others.

    Args:
        dependency: of the job, in squeue's words, such as `afterok:12_*(unfulfilled)`.
        job_id: of the job; a task of an array waits by `aftercorr` for the task of its number.
        parents: the others.
    """
    own_task = job_id.partition("_")[2]
    conditions = re.split("[,?]", dependency)
    doomed = [any(_is_doomed(one, own_task, parent) for parent in parents) for one in conditions]
    # One condition of those with "?" between them is enough for the job to start.
    return all(doomed) if "?" in dependency else any(doomed)


def _is_doomed(condition: str, own_task: str, parent: str) -> bool:
    """Whether a condition cannot be met if a job has no good end."""
    kind, _, names = condition.partition(":")
    if kind not in ("afterok", "aftercorr"):
        return False
    job, _, task = parent.partition("_")
    for match in re.finditer(r"(?:^|:)(\d+)(?:_(\d+|\*))?", names):
        wanted = own_task if kind == "aftercorr" and match[2] in (None, "*") else match[2]
        if match[1] == job and (not task or wanted in (None, "", "*", task)):
            return True
    return False
