"""The state of a run in one word, from its folder and the queue (no I/O).

Where the two do not decide it the word is `unknown`: a queue that does not answer must not make a
running job look dead, nor a dead one alive.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.run_folder import RunRecord
from launcher.slurm_queue import QueueAnswer, QueuedJob

ENDED = frozenset(
    {"done", "held", "stopped", "failed", "gave up", "cancelled", "lost", "interrupted"}
)
"""States in which nothing goes on, and nothing will by itself."""


@dataclass(frozen=True)
class RunState:
    """What a run is doing.

    Attributes:
        word: "queued", "running", "ending" (its job leaves the nodes, or is requeued), "done",
            "held" (ended early as configured), "stopped" (can be gone on with), "failed",
            "gave up" (too many lives without progress), "cancelled" (by scancel, without a word of
            the ranks), "lost" (its job is gone and left no word),
            "interrupted" (the same for a run without SLURM), "new" (never started), "damaged"
            (its files say nothing of it), "unknown".
        detail: why, where there is more to say.
        job: its job in the queue, if it is there.
    """

    word: str
    detail: str = ""
    job: QueuedJob | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing goes on any more."""
        return self.word in ENDED


@dataclass(frozen=True)
class Viewer:
    """Who looks, and from where.

    Attributes:
        host: name of this machine.
        user: name of this user.
        is_written: whether a process holds the lock of the run's checkpoints; None: not known.
    """

    host: str
    user: str
    is_written: bool | None


def run_state(record: RunRecord, queue: QueueAnswer, viewer: Viewer) -> RunState:
    """Say what a run is doing.

    Args:
        record: what its folder says.
        queue: what the queue says of its jobs.
        viewer: who looks.
    """
    active = [
        queue.jobs[job_id]
        for job_id in record.job_ids
        if job_id in queue.jobs and queue.jobs[job_id].is_active
    ]
    if active:
        return _active_state(active)
    if record.outcome is not None and record.outcome.is_final and not _is_pending(record, queue):
        return RunState(record.outcome.outcome, record.outcome.detail)
    if viewer.is_written:
        return RunState("running", "no job of the queue, but a process writes checkpoints")
    if not record.job_ids:
        return _local_state(record, viewer)
    if not queue.known:
        return RunState("unknown", "; ".join(filter(None, (queue.problem, _last_words(record)))))
    return _gone_state(record, queue, viewer)


def active_jobs(record: RunRecord, queue: QueueAnswer) -> list[QueuedJob]:
    """Return the jobs of a run that are queued, running or ending, oldest first."""
    found = {
        queue.jobs[job_id].job_id: queue.jobs[job_id]
        for job_id in record.job_ids
        if job_id in queue.jobs and queue.jobs[job_id].is_active
    }
    return list(found.values())


def _active_state(jobs: list[QueuedJob]) -> RunState:
    running = [job for job in jobs if job.is_running]
    if running:
        job = running[-1]
        # SLURM's STOPPED is a pause, not a run that has ended.
        word = "suspended" if job.state == "STOPPED" else job.state.lower()
        return RunState(word, job=job)
    ending = [job for job in jobs if not job.is_waiting]
    if ending:
        return RunState("ending", job=ending[-1])
    detail = jobs[0].reason if jobs[0].reason not in ("", "None") else ""
    if "held" in detail.lower():
        detail += f": scontrol release {jobs[0].job_id}"
    return RunState("queued", detail, job=jobs[0])


def _local_state(record: RunRecord, viewer: Viewer) -> RunState:
    """Return the state of a run that was never in a queue and is not written to."""
    if record.outcome is not None:
        return _ended_state(record)
    if record.host is None and record.metrics is None and record.saved_step is None:
        if record.damaged:
            return RunState("damaged", "; ".join(record.damaged))
        return RunState("new", "never started")
    if record.host == viewer.host and viewer.is_written is False:
        return RunState("interrupted", "no process of this machine trains it, and it left no word")
    return RunState("unknown", f"started on {record.host}" if record.host else "")


def _gone_state(record: RunRecord, queue: QueueAnswer, viewer: Viewer) -> RunState:
    """Return the state of a run none of whose jobs is in the queue any more."""
    last = record.last_event
    if last is not None and last.event == "gave_up":
        return RunState("gave up", last.detail)
    if last is not None and last.event == "stopped":
        return RunState("stopped", last.detail)
    if record.outcome is not None:
        return _ended_state(record)
    if record.user not in (None, viewer.user):
        # Clusters may hide the jobs of others.
        return RunState("unknown", f"jobs of {record.user} may be hidden from {viewer.user}")
    job_id = record.job_ids[-1]
    remembered = queue.jobs.get(job_id)
    how = f"ended as {remembered.state}" if remembered else "is no longer in the queue"
    word = "cancelled" if remembered and remembered.state == "CANCELLED" else "lost"
    left = "it left no word" if record.num_starts else "it never started"
    return RunState(word, f"job {job_id} {how}, and {left}")


def _ended_state(record: RunRecord) -> RunState:
    assert record.outcome is not None
    word = "stopped" if record.outcome.outcome == "resume" else record.outcome.outcome
    return RunState(word, record.outcome.detail)


def _is_pending(record: RunRecord, queue: QueueAnswer) -> bool:
    """Whether the run was submitted once more after its end, and the queue does not answer."""
    last = record.last_event
    return not queue.known and last is not None and last.event == "submitted"


def _last_words(record: RunRecord) -> str:
    if record.last_event is not None and record.last_event.event == "gave_up":
        return f"it had given up: {record.last_event.detail}"
    if record.outcome is not None:
        return f"its last start ended as {record.outcome.text}"
    return f"last heard: {record.last_event.event}" if record.last_event is not None else ""
