"""A micro-batch: what the data loader gives, an engine moves and a model reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NO_PAIR = -100
"""Label of tokens at which no pair of segments begins."""


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens with what is to be predicted of them.

    The optional fields belong to objectives other than next-token prediction; None means that the
    whole row is one document, read from position 0 on.

    Attributes:
        inputs: token ids, int64 (B, T); of the decoder where there is an encoder too.
        targets: what to predict, int64 (B, T): the next token, or the token that was masked. In
            fine-tuning (B, 1): the class (int64) or the value (float32) of the whole sequence.
        loss_mask: which targets count in the loss, bool like `targets`.
        sample_ids: position of each sequence in the global sample order, int64 (B,).
        document_ids: document of each token of `inputs`, int64 (B, T), from 1 on; 0 is padding.
            Tokens see those of their own document alone.
        positions: position of each token of `inputs` in its document, int64 (B, T).
        token_types: segment of each token of `inputs`, 0 or 1, int64 (B, T).
        pair_labels: int64 (B, T): at the first token of a pair of segments 0 where they stand in
            order and 1 where they are swapped; -100 at all other tokens.
        encoder_inputs: token ids that the encoder reads, int64 (B, S).
        encoder_document_ids: document of each of them, int64 (B, S), as `document_ids`.
        pair_weight: what the loss of a pair counts in units of that of a target, float32 (); an
            engine sets it to targets over pairs of the whole global batch, so that the objective
            is the mean over all targets plus the mean over all pairs.
    """

    inputs: Tensor
    targets: Tensor
    loss_mask: Tensor
    sample_ids: Tensor
    document_ids: Tensor | None = None
    positions: Tensor | None = None
    token_types: Tensor | None = None
    pair_labels: Tensor | None = None
    encoder_inputs: Tensor | None = None
    encoder_document_ids: Tensor | None = None
    pair_weight: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device` (asynchronously where memory is pinned)."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from where copies to CUDA are asynchronous."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(v) for name, v in given.items() if v is not None}
        return replace(self, **changed)

    @property
    def num_tokens(self) -> int:
        """Number of targets that count in the loss."""
        return int(self.loss_mask.sum())

    @property
    def num_pairs(self) -> int:
        """Number of pairs of segments whose order is known."""
        return 0 if self.pair_labels is None else int((self.pair_labels != NO_PAIR).sum())


@dataclass(frozen=True)
class LossOutput:
    """What a model returns for a micro-batch.

    The loss is a *sum*: the engine divides by the number of tokens of the whole global batch, so
    that the result depends neither on accumulation nor on the number of processes.

    Attributes:
        loss_sum: sum of the losses of all targets that count, scalar (float32).
        num_tokens: number of those targets, scalar (int64).
        logits: (B, T, V) where they were asked for, else None.
        auxiliary_sum: further terms of the training objective, scalar (float32): a mean over the
            micro-batch (load balancing) times `num_tokens`, or a sum (order of segments) times its
            weight; None where there are none. They are part of what is
            differentiated and no part of the reported loss.
        statistics: sums over this micro-batch by name (loads of experts, right predictions),
            detached; an engine adds them up over micro-batches and ranks. A model gives the same
            names and shapes for every micro-batch of one mode (training or evaluation).
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
