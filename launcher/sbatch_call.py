"""sbatch, for good or as a question. Where its answer is unclear the job may be queued."""

from __future__ import annotations

import os

from launcher.commands import Command
from launcher.launch_error import LaunchError
from launcher.slurm_call import call, job_id_of
from launcher.surroundings import without_job

TIMEOUT_SECONDS = 120
"""A controller under load may take a minute to answer."""
_LOOK = "see with squeue whether the job was queued before you try again"


class UnclearAnswerError(LaunchError):
    """SLURM may have taken the job, or not."""


def rehearse_sbatch(command: Command) -> None:
    """Ask SLURM whether it would take a job; nothing is queued.

    Args:
        command: what would submit it.

    Raises:
        LaunchError: it would not, or does not answer.
    """
    argv = (command.argv[0], "--test-only", *command.argv[1:])
    reply = call(argv, seconds=TIMEOUT_SECONDS, environment=_environment(command))
    said = reply.problem.removeprefix(f"{command.argv[0]}: ")
    if reply.is_unclear or reply.is_unsent:
        raise LaunchError(f"sbatch --test-only has got no answer ({said})")
    if not reply.ok:
        raise LaunchError(f"sbatch --test-only refuses the job: {said}")


def run_sbatch(command: Command) -> str:
    """Run a command of sbatch and return the job id.

    Args:
        command: with `--parsable` among its options.

    Raises:
        UnclearAnswerError: SLURM does not answer, or answers something else.
        LaunchError: SLURM refuses the job.
    """
    reply = call(command.argv, seconds=TIMEOUT_SECONDS, environment=_environment(command))
    said = reply.problem.removeprefix(f"{command.argv[0]}: ")
    if reply.is_unclear:
        raise UnclearAnswerError(f"sbatch has got no answer ({said}); {_LOOK}")
    if not reply.ok:
        raise LaunchError(f"sbatch refuses the job: {said}")
    job_id = job_id_of(reply.output)
    if job_id is None:
        answer = reply.output.strip()
        raise UnclearAnswerError(f"sbatch answers {answer!r}, which is no job id; {_LOOK}")
    return job_id


def _environment(command: Command) -> dict[str, str]:
    return without_job(os.environ) | dict(command.environment)
