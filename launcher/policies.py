"""Sections of the cluster file for the life cycle of a job and for the check of its nodes."""

from __future__ import annotations

from functools import partial
from typing import Literal

from mpotrain.schema import collect_problems, config

SHORTEST_CHECK = 10
"""Seconds that `mpotrain preflight` needs to tell a slow node from a dead one."""
REQUEUE_SECONDS = 30
"""What the way from a checkpoint back into the queue takes."""


@config
class LivesConfig:
    """How a run survives time limits, pre-emption and failures.

    A life is one start of the run: a new job, or one more start of a requeued one. A life has made
    progress if the newest complete checkpoint is of a later step than before.
    """

    warning_seconds: int = 120
    """Seconds before the time limit at which SLURM warns the job, which then writes a checkpoint
    and goes on in a new life. It must be longer than a step and a checkpoint together."""
    grace_seconds: int | None = None
    """Seconds that ranks have to write a checkpoint once they were asked to stop; those that are
    still there afterwards are killed. By default all of `warning_seconds` but the last 30, which
    the way back into the queue takes."""
    max_lives: int = 1000
    """Lives of a run after which it is given up whatever its progress."""
    lives_without_progress: int = 3
    """Failed lives one after another, none of them with a new checkpoint, after which the run is
    given up."""
    restart: Literal["requeue", "resubmit"] = "requeue"
    """How a run goes on after a failure: "requeue" keeps the job id and waits until SLURM trusts
    its nodes again; "resubmit" submits a new job at once, which excludes nodes that do not
    answer."""
    requeue: bool = True
    """Whether the run goes on by itself after a time limit, pre-emption or a failure at all."""
    srun_wait_seconds: int = 60
    """Seconds after the end of the first rank at which srun kills the others."""
    worker_restarts: int = 0
    """Times that torchrun starts all ranks anew inside one life before the life has failed."""

    @property
    def seconds_to_save(self) -> int:
        """Seconds that ranks have to write a checkpoint: `grace_seconds` or its default."""
        if self.grace_seconds is not None:
            return self.grace_seconds
        return max(1, self.warning_seconds - REQUEUE_SECONDS)

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the section, one line each.

        Args:
            where: dotted key of this section.
        """
        least = {
            "warning_seconds": 1,
            "max_lives": 1,
            "lives_without_progress": 1,
            "srun_wait_seconds": 1,
            "worker_restarts": 0,
        }

        def at_least(key: str, value: int) -> list[str]:
            given = getattr(self, key)
            return (
                [] if given >= value else [f"{where}.{key}: must be at least {value}, is {given}"]
            )

        return collect_problems(
            *(partial(at_least, key, value) for key, value in least.items()),
            lambda: self._grace_problems(f"{where}.grace_seconds"),
            lambda: self._warning_problems(f"{where}.warning_seconds"),
            lambda: self._longest_problems(where),
        )

    def _grace_problems(self, where: str) -> list[str]:
        if self.seconds_to_save >= 1:
            return []
        return [f"{where}: must be at least 1, is {self.grace_seconds}"]

    def _warning_problems(self, where: str) -> list[str]:
        if self.warning_seconds <= 65_535:
            return []
        return [f"{where}: {self.warning_seconds}, but SLURM takes at most 65535"]

    def _longest_problems(self, where: str) -> list[str]:
        warning = self.warning_seconds
        if self.seconds_to_save <= max(1, warning):
            return []
        return [
            f"{where}.grace_seconds: {self.grace_seconds} is longer than the {warning} seconds "
            f"that {where}.warning_seconds leaves before the time limit"
        ]


@config
class PreflightConfig:
    """What every node must show before the first rank starts; 0 leaves a check out."""

    enabled: bool = True
    """Whether nodes are checked at all."""
    min_free_gib: float = 10.0
    """GiB that must be free where the run folder lies."""
    min_write_mib_per_s: float = 10.0
    """MiB per second at which a node must be able to write into the run folder."""
    min_gpu_gib: float = 0.0
    """GiB of memory that every GPU must have free."""
    min_bandwidth_gib_per_s: float = 0.0
    """GiB per second (bus bandwidth) of an all-reduce inside a node and between two nodes."""
    max_clock_skew_seconds: float = 5.0
    """Largest difference between the clocks of two nodes."""
    timeout_seconds: int = 300
    """Seconds after which a node that has not answered is taken for broken."""

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the section, one line each.

        Args:
            where: dotted key of this section.
        """
        limits = (
            "min_free_gib",
            "min_write_mib_per_s",
            "min_gpu_gib",
            "min_bandwidth_gib_per_s",
            "max_clock_skew_seconds",
        )

        def not_negative(key: str) -> list[str]:
            given = getattr(self, key)
            return [] if given >= 0 else [f"{where}.{key}: must not be negative, is {given}"]

        return collect_problems(
            *(partial(not_negative, key) for key in limits),
            lambda: self._timeout_problems(f"{where}.timeout_seconds"),
        )

    def _timeout_problems(self, where: str) -> list[str]:
        if self.timeout_seconds >= SHORTEST_CHECK:
            return []
        return [f"{where}: must be at least {SHORTEST_CHECK}, is {self.timeout_seconds}"]
