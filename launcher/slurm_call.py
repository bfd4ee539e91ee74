"""One command of SLURM: started without a shell, with a time limit; failures are values."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.surroundings import without_job

CALL_SECONDS = 20.0
"""Time limit of one command; a busy controller answers within seconds."""

UNKNOWN_SECONDS = 600.0
"""How long to try against a failure of which nobody knows whether it goes away."""

_UNREACHED = re.compile(
    r"unable to contact|connection refused|no route|try again|connection failure|standby mode"
    r"|munge encode|authentication agent|configuration source",
    re.IGNORECASE,
)
"""What SLURM says when a request has not reached it, or not yet been taken."""
_UNANSWERED = re.compile(
    r"timed out|not answered|temporarily|communication|zero bytes|munge|authentication|credential"
    r"|not connected|incompatible versions|internal error",
    re.IGNORECASE,
)
"""What SLURM says when a request may have reached it."""
_REFUSED = re.compile(
    r"denied|disabled|permitted|\binvalid\b|violates|exceed|breached|requested more|only batch"
    r"|not available|not supported|unsupported|no partition|not in this partition"
    r"|already (completing|finished)|pending (execution|nor running)",
    re.IGNORECASE,
)
"""What SLURM says when it will not do what it is asked to, however often."""
_ANSWER = re.compile(r"(?P<job>[0-9]+)(?:;\S+)?")
"""What sbatch prints with `--parsable`: `JOBID`, or `JOBID;CLUSTER` on a federation."""


@dataclass(frozen=True)
class Reply:
    """What a command has come to.

    Attributes:
        output: its standard output.
        problem: what went wrong, in one line; empty where nothing did.
    """

    output: str = ""
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the command did what it was asked to."""
        return not self.problem

    @property
    def is_unsent(self) -> bool:
        """Whether the controller was away, so that nothing can have been done."""
        return bool(_UNREACHED.search(self.problem))

    @property
    def is_unclear(self) -> bool:
        """Whether the request may have been granted all the same."""
        return bool(_UNANSWERED.search(self.problem)) and not self.is_unsent

    @property
    def may_pass(self) -> bool:
        """Whether it failed for a reason that may go away, as opposed to a refusal.

        There are more ways to fail than anybody lists: what is not known is no refusal.
        """
        return not self.ok and (self._is_known_to_pass or not _REFUSED.search(self.problem))

    def patience(self, seconds: float) -> float:
        """Return how long to go on trying, of `seconds`; nodes stand idle meanwhile."""
        if self._is_known_to_pass:
            return seconds
        return min(seconds, UNKNOWN_SECONDS) if self.may_pass else 0.0

    @property
    def _is_known_to_pass(self) -> bool:
        return self.is_unsent or bool(_UNANSWERED.search(self.problem))


def call(
    argv: Sequence[str],
    *,
    seconds: float = CALL_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> Reply:
    """Run a command and wait for it.

    Args:
        argv: program and arguments.
        seconds: time after which it is killed.
        environment: all its variables; by default those of `command_environment`.
    """
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=dict(command_environment() if environment is None else environment),
            check=False,
            # A signal to the process group of the batch script is not meant for this command.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return Reply(problem=f"{argv[0]} has not answered within {seconds:g} s")
    except OSError as error:
        return Reply(problem=f"{argv[0]} cannot be run ({error.strerror or error})")
    output = done.stdout.decode(errors="replace")
    if done.returncode == 0:
        return Reply(output)
    said = " ".join(done.stderr.decode(errors="replace").split())
    return Reply(output, f"{argv[0]}: {said or f'exit code {done.returncode}'}")


def job_id_of(answer: str) -> str | None:
    """Return the job id in what sbatch has printed; None where there is none.

    Args:
        answer: its standard output. Sites let it say more: news, the state of an account.
    """
    lines = map(str.strip, answer.splitlines())
    found = [match["job"] for match in map(_ANSWER.fullmatch, lines) if match]
    return found[-1] if found else None


def command_environment() -> dict[str, str]:
    """Return this process's variables without those that change what the commands do or print.

    Of a job's own variables, which srun takes for options (SLURM_NTASKS, SLURM_MEM_PER_NODE, ...),
    only its number stays.
    """
    own = {
        key: value
        for key, value in without_job(os.environ).items()
        if not key.startswith(("SQUEUE_", "SCANCEL_", "SCONTROL_"))
    }
    job = {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_JOBID") if key in os.environ}
    return {**own, **job, "LC_ALL": "C"}
