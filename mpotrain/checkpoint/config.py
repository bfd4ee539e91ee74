"""When checkpoints are written, which are kept and how they are checked (no torch)."""

from __future__ import annotations

from mpotrain.schema import config


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
        found = []
        if self.every < 1:
            found.append(f"{where}.every: {self.every} steps is not a positive interval")
        if self.keep_last < 1:
            found.append(
                f"{where}.keep_last: {self.keep_last} would keep no checkpoint; at least 1"
            )
        if self.keep_every is not None and self.keep_every < 1:
            found.append(f"{where}.keep_every: {self.keep_every} steps is not a positive interval")
        elif self.keep_every is not None and self.every >= 1 and self.keep_every % self.every:
            nearest = max(1, round(self.keep_every / self.every)) * self.every
            found.append(
                f"{where}.keep_every: {self.keep_every} is not a multiple of {where}.every "
                f"({self.every}), so most of those steps are never saved; nearest is {nearest}"
            )
        return found
