"""What is to be done with one point of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.run_state import RunState
from launcher.submission import Submission
from launcher.sweep_points import Point

Action = Literal["submit", "finished", "queued"]
"""submit: a job is needed. finished: the run has come to its end. queued: its job is there, or it
trains outside of the queue."""


@dataclass(frozen=True)
class PlannedPoint:
    """A point that was checked.

    Attributes:
        point: the point.
        submission: the job, ready to be submitted.
        action: what is to be done.
        state: what its run is doing.
        job_id: its job, if it has one in the queue.
        changed: settings that its run folder has otherwise, as `key: old -> new`.
        replaces: job that waits in the queue, and is taken out of it before anything is submitted.
    """

    point: Point
    submission: Submission
    action: Action
    state: RunState
    job_id: str | None
    changed: tuple[str, ...] = ()
    replaces: str | None = None
