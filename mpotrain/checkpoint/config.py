"""When checkpoints are written, which are kept and how they are checked (no torch)."""

from __future__ import annotations

from functools import partial

from mpotrain.schema import collect_problems, config


@config
class CheckpointConfig:
    """Interval, retention and verification of checkpoints."""

    every: int = 1000
    """Steps between two checkpoints; the last step and a stop on request also write one."""
    keep_last: int = 3
    """Number of newest complete checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this are kept for ever; absent: none."""
    verify: bool = True
    """Compare the digest of every file before a checkpoint is loaded."""

    def problems(self, where: str) -> list[str]:
        """Return everything that is wrong with the section, one line each.

        Args:
            where: dotted key of the section.
        """
        return collect_problems(
            partial(self._interval_problems, where, "every"),
            partial(self._number_problems, where),
            partial(self._interval_problems, where, "keep_every"),
            partial(self._multiple_problems, where),
        )

    def _interval_problems(self, where: str, key: str) -> list[str]:
        steps = getattr(self, key)
        if steps is None or steps >= 1:
            return []
        return [f"{where}.{key}: {steps} steps is not a positive interval"]

    def _number_problems(self, where: str) -> list[str]:
        if self.keep_last >= 1:
            return []
        return [f"{where}.keep_last: {self.keep_last} would keep no checkpoint; at least 1"]

    def _multiple_problems(self, where: str) -> list[str]:
        if self.keep_every is None or min(self.keep_every, self.every) < 1:
            return []
        if self.keep_every % self.every == 0:
            return []
        nearest = max(1, round(self.keep_every / self.every)) * self.every
        return [
            f"{where}.keep_every: {self.keep_every} is not a multiple of {where}.every "
            f"({self.every}), so most of those steps are never saved; nearest is {nearest}"
        ]
