"""The last line in the log of a life: what has become of the run, and the next command (no I/O).

Somebody reads it in the night who has never seen the run. One sentence each, and one command where
a person has something to do.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from launcher.job_state import JobState
from launcher.slurm_queue import WAITING_STATES


class LastWords:
    """The last line of a life of one job."""

    def __init__(self, job_id: str, run_folder: Path, again: str) -> None:
        """Note what all of them need.

        Args:
            job_id: the job.
            run_folder: the run folder.
            again: the shell line with which a person starts the run again.
        """
        self._job_id, self._again = job_id, again
        self._follow = f"follow it: python -m launcher logs {shlex.quote(str(run_folder))} -f"

    def done(self, detail: str, step: int | None) -> str:
        """Say that the run has come to its end."""
        return (
            f"the run has come to its end with {_saved(step)} ({_line(detail)}): nothing is left "
            "to do"
        )

    def stopped(self, why: str, step: int | None) -> str:
        """Say that somebody wanted the run to stop, or that it does not come back by itself."""
        return f"the run ends here with {_saved(step)}: {_line(why)}; to go on: {self._again}"

    def taken(self, state: JobState, step: int | None) -> str:
        """Say that SLURM has taken the job away, which has ways to come back that it hides."""
        if state.state in WAITING_STATES:
            return (
                f"SLURM has put job {self._job_id} back into the queue (state {state.state}): the "
                f"run goes on by itself {_from(step)}; {self._follow}"
            )
        return (
            f"SLURM ends job {self._job_id} (state {state.state}) with {_saved(step)}: it comes "
            "back by itself if it was pre-empted or requeued; if it was cancelled, to go on: "
            f"{self._again}"
        )

    def given_up(self, reason: str, step: int | None) -> str:
        """Say that no other life follows, because it would not help."""
        return (
            f"the run is given up with {_saved(step)}: {_line(reason)}; when that is mended, to go "
            f"on: {self._again}"
        )

    def requeued(self, reason: str, step: int | None) -> str:
        """Say that the job goes back into the queue."""
        return (
            f"job {self._job_id} goes back into the queue and the run goes on by itself "
            f"{_from(step)}; this life ended because: {_line(reason)}; {self._follow}"
        )

    def resubmitted(
        self, next_job: str, exclude: Sequence[str], reason: str, step: int | None
    ) -> str:
        """Say that a new job takes this one's place."""
        without = f" without {', '.join(exclude)}" if exclude else ""
        return (
            f"job {next_job} takes the place of job {self._job_id}{without} and the run goes on by "
            f"itself {_from(step)}; this life ended because: {_line(reason)}; {self._follow}"
        )

    def left_to(self, other: str) -> str:
        """Say that another job trains the run already."""
        return f"job {other} goes on with this run: nothing to do here; {self._follow}"


def _saved(step: int | None) -> str:
    return "no checkpoint" if step is None else f"a checkpoint of step {step}"


def _from(step: int | None) -> str:
    return "from the start" if step is None else f"from the checkpoint of step {step}"


def _line(reason: str) -> str:
    return " ".join(reason.split())
