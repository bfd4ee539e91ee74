"""A run as its folder shows it: lives, newest metrics, checkpoint, outcome."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LAUNCH = "launch"
"""Folder in the run folder in which the launcher keeps its files."""
RUN_FILE = "run.toml"
SUBMISSION_FILE = "submission.json"
LIVES_FILE = "lives.jsonl"
CONFIG_FILE = "config.toml"
OUTCOME_FILE = "outcome.json"
ENVIRONMENT_FILE = "environment.jsonl"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class LifeEvent:
    """One line of `lives.jsonl`.

    Attributes:
        event: "submitted", "started", "warned", "ended", "requeued", "resubmitted", "stopped",
            "gave_up", "done", "preflight".
        time: seconds since 1970.
        job_id: job of the life; None where it is no batch job.
        next_job: job that takes its place.
        life: number of the life.
        step: newest complete checkpoint.
        nodes: where it ran.
        detail: in words.
    """

    event: str
    time: float | None = None
    job_id: str | None = None
    next_job: str | None = None
    life: int | None = None
    step: int | None = None
    nodes: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the last start ended: `outcome.json`.

    Attributes:
        outcome: "done", "held", "resume" or "failed".
        detail: in words.
        reason: why it was stopped ("SIGUSR1", "STOP_FILE", ...), if it was.
        exit_code: of rank 0.
    """

    outcome: str
    detail: str = ""
    reason: str | None = None
    exit_code: int | None = None

    @property
    def is_final(self) -> bool:
        """Whether the run has come to the end that was configured."""
        return self.outcome in ("done", "held")

    @property
    def text(self) -> str:
        """Outcome, reason and detail in one line."""
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.outcome}{reason}{': ' if self.detail else ''}{self.detail}"


@dataclass(frozen=True, kw_only=True)
class LastMetrics:
    """The newest training line of the metrics.

    Attributes:
        step: steps done.
        loss: mean loss per token in nats.
        tokens_per_second: of all ranks.
        time: seconds since 1970.
    """

    step: int
    loss: float | None = None
    tokens_per_second: float | None = None
    time: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything that a run folder says without SLURM.

    Attributes:
        folder: the run folder.
        name: of the run; the folder's where no configuration can be read.
        num_steps: steps of the whole run.
        user: who submitted it.
        host: where rank 0 last started.
        job_ids: its batch jobs, oldest first.
        waits_for: jobs that had to end well before its newest submission could start.
        lives: events, oldest first.
        metrics: newest training line.
        saved_step: newest checkpoint.
        outcome: how the last start ended; None while it runs and after a kill.
        stop_requested: whether the stop file is there.
        damaged: files that could not be read, with the reason.
    """

    folder: Path
    name: str
    num_steps: int | None = None
    user: str | None = None
    host: str | None = None
    job_ids: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()
    lives: tuple[LifeEvent, ...] = ()
    metrics: LastMetrics | None = None
    saved_step: int | None = None
    outcome: Outcome | None = None
    stop_requested: bool = False
    damaged: tuple[str, ...] = ()

    @property
    def num_starts(self) -> int:
        """Lives that the launcher has begun.

        A line stands there twice where the disk said of the first that it had failed.
        """
        return len({(life.job_id, life.life) for life in self.lives if life.event == "started"})

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes of the newest life that names any."""
        return next((life.nodes for life in reversed(self.lives) if life.nodes), ())

    @property
    def last_event(self) -> LifeEvent | None:
        """The newest event."""
        return self.lives[-1] if self.lives else None

    @property
    def updated(self) -> float | None:
        """When the run last wrote something of itself, in seconds since 1970."""
        times = [life.time for life in self.lives if life.time is not None]
        if self.metrics is not None and self.metrics.time is not None:
            times.append(self.metrics.time)
        return max(times, default=None)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run that was submitted or started."""
    try:
        return (folder / LAUNCH).is_dir() or (folder / CONFIG_FILE).is_file()
    except OSError:
        return False
