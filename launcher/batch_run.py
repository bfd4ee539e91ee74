"""What one life of a run is about."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.allocation import Allocation
from launcher.restart import NewJob
from launcher.rival import LOCK_SECONDS


@dataclass(frozen=True)
class BatchRun:
    """What a life is about.

    Attributes:
        job: the run, its files and its cluster, as a new job would need them.
        allocation: this job.
        last_step: step at which the run has come to its configured end.
        continues: the job whose place this one takes, if it does.
        settings: what stands for the resolved settings of the run: equal for equal ones.
        lock_seconds: how long to wait for the lock of the checkpoints.
    """

    job: NewJob
    allocation: Allocation
    last_step: int
    continues: str | None = None
    settings: str = ""
    lock_seconds: float = LOCK_SECONDS
