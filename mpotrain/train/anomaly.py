"""NaN, infinity and spikes: decide before the update whether a step counts.

The guard sees the globally reduced loss and gradient norm of every step, before the optimizer
moves. Every rank asks it with the same numbers, so every rank decides alike without a message.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from mpotrain.errors import AnomalyError, CheckpointError
from mpotrain.train.config import AnomalyConfig

RELATIVE_FLOOR = 1e-3
"""A standard deviation below this part of the mean counts as this part: on a plateau the spread
can be as small as rounding, and any step would look like a spike."""


class AnomalyGuard:
    """Gives the reason to skip an update, or None, and counts (a step guard of an engine).

    An update is skipped when

    - the loss or the gradient norm is not finite, or
    - the loss (gradient norm) is above `mean + threshold * deviation` of the accepted steps in
      the window, once the window is half full. Skipped steps never enter the window, so a new,
      lasting level is not taken for normal: `max_skips` in a row stop the run.

    Attributes:
        consecutive: skipped steps in a row up to now.
        num_nonfinite: steps skipped because of NaN or infinity, in the whole run.
        num_spikes: steps skipped because of a spike, in the whole run.
    """

    def __init__(self, config: AnomalyConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._grad_norms: deque[float] = deque(maxlen=config.window)
        self.consecutive = 0
        self.num_nonfinite = 0
        self.num_spikes = 0
        self._last_reason: str | None = None
        self._stop_now = False

    @property
    def num_skipped(self) -> int:
        """Number of steps skipped in the whole run."""
        return self.num_nonfinite + self.num_spikes

    def __call__(self, loss: float, grad_norm: float) -> str | None:
        """Judge one step; call it exactly once for each step, on every rank alike.

        Args:
            loss: mean loss per token of the global batch.
            grad_norm: global gradient norm before clipping.

        Returns:
            The reason to skip the update, or None when it may be made.
        """
        nonfinite = _nonfinite_reason(loss, grad_norm)
        reason = nonfinite or self._spike_reason(loss, grad_norm)
        self._last_reason = reason
        if reason is None:
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
            self.consecutive = 0
            return None
        self.consecutive += 1
        if nonfinite:
            self.num_nonfinite += 1
            self._stop_now = self._config.on_nonfinite == "stop"
        else:
            self.num_spikes += 1
        return reason

    def check(self) -> None:
        """Stop the run if the policy says so; to be asked after every step.

        Raises:
            AnomalyError: `max_skips` steps in a row were skipped, or one was not finite and
                `on_nonfinite` is "stop". The weights are those of the last accepted step.
        """
        if self._last_reason is None:
            return
        if self._stop_now:
            raise AnomalyError(
                f"{self._last_reason}, and train.anomaly.on_nonfinite is 'stop'. The update was "
                "not made. Look at the samples of this step, lower the learning rate, or set "
                "on_nonfinite to 'skip'."
            )
        if self.consecutive >= self._config.max_skips:
            raise AnomalyError(
                f"{self.consecutive} steps in a row were skipped (train.anomaly.max_skips is "
                f"{self._config.max_skips}); the last one because {self._last_reason}. Move the "
                "newest checkpoints away to go on from an earlier one, lower the learning rate or "
                "the clipping norm, or look at the data of these steps."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return counters and window as plain JSON values (floats keep every bit)."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "consecutive": self.consecutive,
            "num_nonfinite": self.num_nonfinite,
            "num_spikes": self.num_spikes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; of a longer window the newest steps are kept.

        Raises:
            CheckpointError: an entry is missing or is not what `state_dict` writes.
        """
        try:
            losses = [float(value) for value in state["losses"]]
            grad_norms = [float(value) for value in state["grad_norms"]]
            counts = [int(state[name]) for name in ("consecutive", "num_nonfinite", "num_spikes")]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's anomaly state cannot be read ({error!r}); "
                "resume from another checkpoint"
            ) from error
        self._losses = deque(losses, maxlen=self._config.window)
        self._grad_norms = deque(grad_norms, maxlen=self._config.window)
        self.consecutive, self.num_nonfinite, self.num_spikes = counts
        self._last_reason, self._stop_now = None, False

    def _spike_reason(self, loss: float, grad_norm: float) -> str | None:
        tests = (
            ("loss", loss, self._losses, self._config.spike_threshold),
            ("gradient norm", grad_norm, self._grad_norms, self._config.grad_norm_threshold),
        )
        for name, value, window, threshold in tests:
            if threshold is None or len(window) < self._config.window // 2:
                continue
            mean = statistics.fmean(window)
            deviation = max(statistics.stdev(window, mean), RELATIVE_FLOOR * abs(mean))
            if value > mean + threshold * deviation:
                return (
                    f"{name} {value:.6g} is a spike (above {mean:.6g} + {threshold:g} x "
                    f"{deviation:.3g} of the last {len(window)} accepted steps)"
                )
        return None


def _nonfinite_reason(loss: float, grad_norm: float) -> str | None:
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"{name} is {value}"
    return None
