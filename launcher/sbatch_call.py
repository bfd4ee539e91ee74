"""One call of sbatch. Where its answer is unclear the job may be queued, and needs its files."""

from __future__ import annotations

import os
import subprocess

from launcher.commands import Command
from launcher.launch_error import LaunchError
from launcher.slurm_call import Reply, job_id_of
from launcher.surroundings import without_job

TIMEOUT_SECONDS = 120
"""A controller under load may take a minute to answer."""


class UnclearAnswerError(LaunchError):
    """SLURM may have taken the job, or not."""


def run_sbatch(command: Command) -> str:
    """Run a command of sbatch and return the job id.

    Args:
        command: with `--parsable` among its options.

    Raises:
        UnclearAnswerError: SLURM does not answer, or answers something else.
        LaunchError: SLURM refuses the job.
    """
    try:
        done = subprocess.run(
            command.argv,
            env=without_job(os.environ) | dict(command.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnclearAnswerError(
            f"sbatch has not answered within {TIMEOUT_SECONDS} s; see with squeue whether the job "
            "was queued before you try again"
        ) from error
    except OSError as error:
        raise LaunchError(f"sbatch cannot be run ({error.strerror or error})") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        if Reply(problem=said).is_unclear:
            raise UnclearAnswerError(
                f"sbatch has got no answer ({said}); see with squeue whether the job was queued "
                "before you try again"
            )
        raise LaunchError(f"sbatch refuses the job: {said}")
    answer = done.stdout.decode(errors="replace").strip()
    job_id = job_id_of(answer)
    if job_id is None:
        raise UnclearAnswerError(
            f"sbatch answers {answer!r}, which is no job id; see with squeue whether the job was "
            "queued before you try again"
        )
    return job_id
