"""Jobs that must end before another one begins: `--after JOBID[:ok|any],...`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.launch_error import LaunchError
from launcher.slurm_call import call
from mpotrain.errors import ConfigError

_AFTER = re.compile(r"(?P<job>[0-9]+(?:_[0-9]+)?)(?::(?P<when>ok|any))?")
_UNKNOWN = ("Invalid job id", "not found")
"""What scontrol says of a job, or of a task of an array, that it does not know."""


def dependency(after: str) -> str:
    """Return `JOBID[:ok|any],...` in the words of sbatch.

    Raises:
        ConfigError: it is something else.
    """
    return ",".join(f"after{when}:{job}" for job, when in _parsed(after))


def jobs_before(after: str) -> tuple[str, ...]:
    """Return the jobs that `JOBID[:ok|any],...` names.

    Raises:
        ConfigError: it is something else.
    """
    return tuple(job for job, _ in _parsed(after))


def require_known(jobs: Sequence[str]) -> None:
    """Make sure that SLURM knows jobs that another one is to wait for.

    It takes a dependency on a job that it does not know for met: a slip of the pen would start the
    job at once. Jobs that have ended are known for some minutes (MinJobAge).

    Args:
        jobs: jobs and tasks of arrays.

    Raises:
        LaunchError: it does not know one of them, or cannot be asked.
    """
    unknown = []
    for job in jobs:
        reply = call(["scontrol", "--oneliner", "show", "job", job])
        if reply.ok:
            continue
        if not any(sign in reply.problem + reply.output for sign in _UNKNOWN):
            raise LaunchError(f"--after: cannot tell whether there is a job {job}: {reply.problem}")
        unknown.append(job)
    if unknown:
        raise LaunchError(
            f"--after: SLURM does not know job {', '.join(unknown)} (or hides it from you), and "
            "would start this job at once instead of waiting; look at the number with squeue, or "
            "leave --after out if that job ended long ago"
        )


def _parsed(after: str) -> list[tuple[str, str]]:
    found = []
    for part in after.split(","):
        match = _AFTER.fullmatch(part)
        if match is None:
            raise ConfigError(
                [f"command line: --after: {part!r} is not JOBID, JOBID:ok or JOBID:any"]
            )
        found.append((match["job"], match["when"] or "ok"))
    return found
