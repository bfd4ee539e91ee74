"""SLURM's view of one job, and what it means for the job itself."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.slurm_queue import RUNNING_STATES

TIMEOUT_REASON = "TimeLimit"
"""What SLURM gives as the reason of a job that it ends because its time is over."""


@dataclass(frozen=True)
class JobState:
    """SLURM's view of a job.

    Attributes:
        state: `RUNNING`, `COMPLETING`, ...; empty where SLURM could not be asked.
        reason: why; `None` (the word) for no reason.
    """

    state: str = ""
    reason: str = ""

    @property
    def is_timeout(self) -> bool:
        """Whether SLURM ends the job because its time is over; it does not start it again."""
        return self.reason == TIMEOUT_REASON and self.state in ("COMPLETING", "TIMEOUT")

    @property
    def is_taken_away(self) -> bool:
        """Whether SLURM ends the job for another reason: cancelled, pre-empted, requeued, ..."""
        return bool(self.state) and self.state not in RUNNING_STATES and not self.is_timeout


RUNNING = JobState("RUNNING")
"""A job that nobody disturbs."""
