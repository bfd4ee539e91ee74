"""The seam between the training loop and the back ends: one optimizer step at a time.

`Engine.step` is the largest unit that all back ends share: accumulation, reduction, clipping and
the update belong to the engine, so the loop knows none of them. What every engine must keep:

- The loss is the sum over all targets of the global batch, over all ranks, divided by their number;
  gradients are those of that mean, whatever the accumulation, the world size or the padding.
- Before micro-batch m of step s torch is seeded with `microbatch_seed(seed, s, m)`, m counted over
  all ranks, so dropout depends neither on the world size nor on what ran before.
- An update that is skipped leaves weights, moments and the update counter bit for bit alone, and
  all ranks skip the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from mpotrain.batch import Batch
from mpotrain.nn.roles import Role
from mpotrain.parallel.ranks import World

WEIGHT = "weight"
"""Kind of a `StateTensor` entry: the fp32 master weight."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Kinds of `StateTensor` entries that AdamW and LAMB add: first and second moment, fp32."""

StepGuard = Callable[[float, float], str | None]
"""Called as guard(loss, gradient norm) before an update; a text is the reason to skip it."""

StateReader = Callable[[str], Mapping[str, Tensor]]
"""Returns the whole fp32 tensors of a logical name, by kind."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: mean loss per target of the global batch, before the update.
        grad_norm: L2 norm of the whole gradient before clipping; each parameter counted once.
        grad_norm_by_role: the same for each role that the model has; None unless asked for.
        num_tokens: targets that counted, over all ranks.
        skipped: whether the update was left out.
        reason: why it was left out, else None.
        statistics: the model's sums over the whole global batch by name (`LossOutput.statistics`),
            float64 on the host; empty where the model has none.
    """

    loss: float
    grad_norm: float
    grad_norm_by_role: dict[str, float] | None
    num_tokens: int
    skipped: bool
    reason: str | None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """Loss over a set of sequences, over all ranks.

    Attributes:
        loss_sum: sum of the losses of all targets (nats).
        num_tokens: number of those targets.
        statistics: the model's sums over all sequences by name (`LossOutput.statistics`), float64
            on the host, the same on every rank; empty where the model has none.
    """

    loss_sum: float
    num_tokens: int
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean loss per target (nats); NaN without targets."""
        return self.loss_sum / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss; infinite where that overflows."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class StateTensor:
    """Training state of one parameter, whole, as a checkpoint stores it.

    Attributes:
        name: logical name, as in `named_parameters()` of the bare model.
        role: what the parameter is.
        shape: its whole shape.
        tensors: fp32 host copies by kind (`WEIGHT` and `MOMENTS`) on the rank that writes this
            parameter, None on all others.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor] | None


class Engine(Protocol):
    """A back end. All methods are collective: every rank calls them in the same order.

    Attributes:
        world: the ranks.
        model: the bare model; logical names are those of its `named_parameters()`. Under expert
            parallelism a rank holds the rows of its own experts.
        num_updates: updates applied so far (Adam's counter); skipped steps do not count.
    """

    world: World
    model: nn.Module
    num_updates: int

    def step(
        self,
        microbatches: Sequence[Batch],
        *,
        lr: float,
        step: int,
        guard: StepGuard | None = None,
        detail: bool = False,
    ) -> StepResult:
        """Run one optimizer step.

        Args:
            microbatches: this rank's micro-batches; slot a of rank r is number a * world + r.
            lr: learning rate; each parameter group multiplies it by its own "lr_factor".
            step: number of the step, which seeds dropout.
            guard: asked before the update; the update is skipped where it returns a reason, and
                always where loss or gradient norm is not finite.
            detail: also return the gradient norm of each role.
        """
        ...

    def evaluate(self, batches: Iterable[Batch]) -> EvalResult:
        """Return the loss over all ranks' batches, without dropout and without gradients.

        Args:
            batches: this rank's part; ranks may have different numbers of batches.
        """
        ...

    def export_state(self) -> Iterator[StateTensor]:
        """Yield the training state parameter by parameter; consume it wholly on every rank."""
        ...

    def counters(self) -> dict[str, int]:
        """Return Adam's counters of tensors that differ from `num_updates`, by logical name.

        Only central tensors under a mask have their own (`CentralMask.updates`).
        """
        ...

    def import_state(
        self, read: StateReader, num_updates: int, counters: Mapping[str, int] | None = None
    ) -> None:
        """Replace the training state parameter by parameter.

        Args:
            read: returns a parameter's whole tensors; without moments where num_updates is 0.
            num_updates: updates applied when the state was exported.
            counters: what `counters` returned then.
        """
        ...

    def full_parameters(self) -> AbstractContextManager[None]:
        """Make all weights whole inside a `with` block, for reading and for plain forward passes.

        Inside, `model` is an ordinary module: single ranks may call it alone.
        """
        ...

    def close(self) -> None:
        """Release hooks and buffers; the world stays."""
        ...


def skip_reason(
    loss: float, grad_norm: float, num_tokens: int, guard: StepGuard | None
) -> str | None:
    """Decide whether an update is left out; same inputs on all ranks give the same answer.

    Args:
        loss: mean loss of the global batch.
        grad_norm: L2 norm of the whole gradient.
        num_tokens: targets that counted.
        guard: asked before the rest, so that it can count what it sees.

    Returns:
        The reason, or None for an update. Values that are not finite never reach the weights,
        whatever the guard says.
    """
    if num_tokens == 0:
        return "no target of the global batch counts in the loss"
    reason = None if guard is None else guard(loss, grad_norm)
    if reason is not None:
        return reason
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"gradient norm is {grad_norm}"
    return None
