"""Runs of a sweep that must wait again, because a run before them is submitted once more.

A parent that gets more steps, or failed, goes on in a new job, of which jobs that were queued
before know nothing: they would start beside it, from half of its training.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.launch_error import LaunchError
from launcher.planned_point import PlannedPoint
from launcher.run_folder import RunRecord
from launcher.slurm_queue import SlurmError, SlurmQueue

LEAVE_SECONDS = 30.0
"""How long waiting jobs may take to leave the queue; SLURM needs a moment."""
POLL_SECONDS = 1.0
_MAX_NAMED = 5


def follow_parents(
    planned: Sequence[PlannedPoint], records: Sequence[RunRecord]
) -> list[PlannedPoint]:
    """Let queued runs be submitted anew where one that they follow is to be submitted.

    Changing the dependency of the job (`scontrol update`) would come too late for one that starts
    in this moment, and would leave jobs behind that wait for nothing if it failed half way. A job
    that is taken out of the queue before anything is submitted can do no harm, and the same command
    again submits what is missing.

    Args:
        planned: all points of the sweep, each after those that it waits for.
        records: what their run folders say.

    Returns:
        The points; those that `replaces` a job take it out of the queue first.

    Raises:
        LaunchError: a run has begun already behind one that is to be submitted.
    """
    again: set[Path] = set()
    found: list[PlannedPoint] = []
    begun: list[tuple[PlannedPoint, Path]] = []
    for one, record in zip(planned, records, strict=True):
        parent = next((parent for parent in one.point.parents if parent in again), None)
        if one.action == "queued" and parent is not None:
            if _has_begun(one, record):
                begun.append((one, parent))
            one = replace(one, action="submit", replaces=one.job_id)
        if one.action == "submit":
            again.add(one.point.folder)
        found.append(one)
    if begun:
        child, parent = begun[0]
        folder = child.submission.folder
        raise LaunchError(
            f"{folder}: is {child.state.word} and has begun behind {parent}, which would be trained"
            f" further beside it{f' ({len(begun) - 1} more like that)' if len(begun) > 1 else ''}; "
            "wait for its end, or let it stop and submit it again behind that run (python -m "
            f"launcher cancel {shlex.quote(str(folder))}), and give the same command again"
        )
    return found


def refuse_waiting_strangers(planned: Sequence[PlannedPoint], queue: SlurmQueue) -> None:
    """Refuse to take jobs out of the queue that others than runs of the sweep wait for.

    SLURM would throw those out as well.

    Args:
        planned: all points of the sweep.
        queue: of the cluster.

    Raises:
        LaunchError: there are such jobs, or the queue does not say.
    """
    replaced = {one.replaces: one for one in planned if one.replaces is not None}
    if not replaced:
        return
    try:
        strangers = [job for job in queue.dependents(replaced) if job not in replaced]
    except SlurmError as error:
        raise LaunchError(
            f"cannot tell which jobs wait for those of this sweep: {error}; try again later"
        ) from error
    if strangers:
        shown = ", ".join(strangers[:_MAX_NAMED]) + (", ..." if strangers[_MAX_NAMED:] else "")
        raise LaunchError(
            f"{next(iter(replaced.values())).submission.folder}: must wait for a run that is "
            "submitted once more, so its job would be taken out of the queue and submitted anew; "
            f"but job {shown}, of no run of this sweep, waits for it or for another one like that, "
            "and would be lost: take it out of the queue first (scancel), and submit it again later"
        )


def take_out(
    planned: Sequence[PlannedPoint],
    queue: SlurmQueue,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Take the jobs out of the queue that are to be submitted anew, before anything is submitted.

    Args:
        planned: all points of the sweep, each after those that it waits for.
        queue: of the cluster.
        sleep: how to wait.

    Raises:
        LaunchError: one of them has begun to run meanwhile, or SLURM does not do it.
    """
    # The last ones first: SLURM throws out what waits for a job that is gone.
    jobs = [one.replaces for one in reversed(planned) if one.replaces is not None]
    if not jobs:
        return
    end = time.monotonic() + LEAVE_SECONDS
    try:
        queue.cancel(jobs, waiting_only=True)
    except SlurmError as error:
        raise LaunchError(f"{error}; nothing was submitted") from error
    while True:
        answer = queue.jobs(jobs)
        left = [job for job in answer.jobs.values() if job.is_active]
        if answer.known and not left:
            return
        running = [job.job_id for job in left if job.is_running]
        if running or time.monotonic() >= end:
            break
        sleep(POLL_SECONDS)
    why = (
        f"job {', '.join(running[:_MAX_NAMED])} has begun to run in this moment"
        if running
        else answer.problem or f"job {', '.join(job.job_id for job in left[:_MAX_NAMED])} stays"
    )
    raise LaunchError(
        f"jobs that must wait for a run that is submitted once more were taken out of the queue, "
        f"but {why}; nothing was submitted, and the same command again goes on"
    )


def _has_begun(one: PlannedPoint, record: RunRecord) -> bool:
    """Whether a queued run has trained in its job, or in one whose place that has taken."""
    if one.state.job is None or not one.state.job.is_waiting:
        return True
    jobs: set[str | None] = {one.job_id}
    for life in reversed(record.lives):
        if life.next_job in jobs:
            jobs.add(life.job_id)
        if life.event == "started" and life.job_id in jobs:
            return True
    return False
