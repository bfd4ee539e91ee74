"""A micro-batch: what the data loader gives, an engine moves and a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token sequences with their next-token targets.

    Attributes:
        inputs: token ids, int64 (B, T).
        targets: ids to predict, int64 (B, T).
        loss_mask: which targets count in the loss, bool (B, T).
        sample_ids: position of each sequence in the global sample order, int64 (B,).
    """

    inputs: Tensor
    targets: Tensor
    loss_mask: Tensor
    sample_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device` (asynchronously where memory is pinned)."""
        return Batch(
            inputs=self.inputs.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
        )

    @property
    def num_tokens(self) -> int:
        """Number of targets that count in the loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class LossOutput:
    """What a model returns for a micro-batch.

    The loss is a *sum*: the engine divides by the number of tokens of the whole global batch, so
    that the result depends neither on accumulation nor on the number of processes.

    Attributes:
        loss_sum: sum of the losses of all targets that count, scalar (float32).
        num_tokens: number of those targets, scalar (int64).
        logits: (B, T, V) where they were asked for, else None.
        auxiliary_sum: further terms of the training objective (load balancing), already times
            `num_tokens`, scalar (float32); None where there are none. They are part of what is
            differentiated and no part of the reported loss.
        statistics: sums over this micro-batch by name (loads of experts), detached; an engine adds
            them up over micro-batches and ranks.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    logits: Tensor | None = None
    auxiliary_sum: Tensor | None = None
    statistics: Mapping[str, Tensor] | None = None

    @property
    def objective(self) -> Tensor:
        """What is differentiated: the loss and the auxiliary terms, as a sum."""
        return self.loss_sum if self.auxiliary_sum is None else self.loss_sum + self.auxiliary_sum
