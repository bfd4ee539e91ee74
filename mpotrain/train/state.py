"""Where a run stands, and how one start of it ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mpotrain.engine.base import StepResult


class Outcome(StrEnum):
    """How a start of a run ended."""

    DONE = "done"
    """All steps are made and saved."""
    HELD = "held"
    """Ended and saved at `train.stop_after`, as configured; there are steps left."""
    STOPPED = "resume"
    """Stopped on request after a checkpoint; the same command goes on."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands: with weights and moments, all that a resume needs.

    Attributes:
        step: steps done, skipped ones included.
        consumed_samples: position in the global sample order.
        num_updates: optimizer updates made (steps that were not skipped).
        tokens: targets that counted in the loss up to now.
    """

    step: int = 0
    consumed_samples: int = 0
    num_updates: int = 0
    tokens: int = 0

    def after(self, result: StepResult, num_samples: int) -> RunState:
        """Return the state after a step that read `num_samples` sequences."""
        return RunState(
            step=self.step + 1,
            consumed_samples=self.consumed_samples + num_samples,
            num_updates=self.num_updates + (not result.skipped),
            tokens=self.tokens + result.num_tokens,
        )
