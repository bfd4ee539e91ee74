"""The loss of a network that scores every target of a batch, with what its mixtures add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mpotrain.batch import Batch, LossOutput
from mpotrain.nn.block import AUXILIARY_LOSS, stack_mixtures


def token_loss(
    logits: Tensor,
    batch: Batch,
    mixtures: Sequence[Mapping[str, Tensor]],
    *,
    training: bool,
    return_logits: bool,
) -> LossOutput:
    """Return the summed cross-entropy of the targets that count, in fp32.

    Args:
        logits: scores (B, T, V) in the dtype of the network.
        batch: targets and loss mask (B, T).
        mixtures: what each mixture of experts told, in order; empty without any.
        training: add the auxiliary losses of the mixtures; else count the right predictions.
        return_logits: also return the scores in fp32.
    """
    targets = batch.targets.masked_fill(~batch.loss_mask, -100)
    loss_sum = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    num_tokens = batch.loss_mask.sum()
    auxiliary, statistics = None, stack_mixtures(mixtures)
    if mixtures and training:
        # A mean over the tokens that meet a mixture becomes a sum over targets, as every loss is.
        auxiliary = torch.stack([m[AUXILIARY_LOSS] for m in mixtures]).sum() * num_tokens
    if not training:
        right = (logits.argmax(-1) == batch.targets) & batch.loss_mask
        statistics["correct"] = right.sum()
    return LossOutput(
        loss_sum=loss_sum,
        num_tokens=num_tokens,
        logits=logits.float() if return_logits else None,
        auxiliary_sum=auxiliary,
        statistics=statistics,
    )
