"""Stands in an optimizer's `step`: refuses it, scales gradients, lets central tensors rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mpotrain.engine.central_mask import CentralMask, FragmentOf

CLIP_EPSILON = 1e-6
"""Added to the norm before the division, as `torch.nn.utils.clip_grad_norm_` does."""


def clip_coefficient(norm: float, clip_norm: float | None) -> float:
    """Return what gradients are multiplied by so that their norm is at most `clip_norm`.

    Args:
        norm: L2 norm of the whole gradient.
        clip_norm: largest norm that is let through; None = no clipping.
    """
    if clip_norm is None:
        return 1.0
    return min(1.0, clip_norm / (norm + CLIP_EPSILON))


class StepGate:
    """Stands in an optimizer's `step` and decides what passes.

    Every ZeRO stage prepares gradients, calls the client optimizer's `step` (once, or once for
    each group), copies masters to weights and clears its buffers. With the gate shut all of this
    runs but the update itself, so masters, moments and counters stay as they were, and the copy
    changes nothing. Gradients are clipped here too, with the norm that the engine has computed:
    it counts each element once, whoever holds it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, mask: CentralMask, fragment_of: FragmentOf
    ) -> None:
        """Replace the optimizer's `step`.

        Args:
            optimizer: the client optimizer.
            mask: what rests at which step.
            fragment_of: where the central tensors lie.
        """
        self._optimizer, self._mask, self._fragment_of = optimizer, mask, fragment_of
        self._step: Callable[..., Any] = optimizer.step
        self._open, self._clip, self._number = True, 1.0, 0
        optimizer.step = self._gated  # type: ignore[assignment, method-assign]

    @contextmanager
    def passing(self, allowed: bool, *, step: int, clip: float) -> Iterator[None]:
        """Open or shut the gate for the length of a block.

        Args:
            allowed: whether updates pass.
            step: number of the step, which decides what rests.
            clip: factor of all gradients.
        """
        self._open, self._number, self._clip = allowed, step, clip
        try:
            yield
        finally:
            self._open = True

    def set(self, *, step: int, clip: float) -> None:
        """Let the next update pass.

        Args:
            step: number of the step, which decides what rests.
            clip: factor of all gradients.
        """
        self._open, self._number, self._clip = True, step, clip

    def remove(self) -> None:
        """Give the optimizer its own `step` back."""
        self._optimizer.__dict__.pop("step", None)

    def _gated(self, closure: Callable[[], float] | None = None) -> float | None:
        if not self._open:
            return None
        groups = self._optimizer.param_groups
        awake = self._mask.awake(groups, self._number)
        if not awake:
            return None
        if self._clip != 1.0:
            for group in awake:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._clip)
        self._optimizer.param_groups = awake
        try:
            with self._mask.keeping_elements(self._optimizer, self._number, self._fragment_of):
                result: float | None = self._step(closure)
        finally:
            self._optimizer.param_groups = groups
        return result
