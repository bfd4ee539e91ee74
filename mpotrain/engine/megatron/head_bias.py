"""Relative positions of T5 for the attention heads of one tensor-parallel rank."""

from __future__ import annotations

import torch
from torch import Tensor

from mpotrain.engine.megatron.placement import Cut
from mpotrain.engine.megatron.slots import LogicalModule, Slots
from mpotrain.nn.attention import document_mask
from mpotrain.nn.relative_bias import RelativeBias, bucket_table
from mpotrain.nn.t5_stack import hide


class HeadBias(RelativeBias, LogicalModule):
    """Some columns of a stack's table: what the scores of a rank's heads gain from distances.

    A column serves one head alone, so each rank computes the terms of its heads, and the gradient
    of its columns, without any exchange. The forward pass is that of the whole table.
    """

    def __init__(
        self,
        slots: Slots,
        name: str,
        *,
        num_buckets: int,
        max_distance: int,
        bidirectional: bool,
        heads: Cut,
    ) -> None:
        """Make the parameter.

        Args:
            slots: makes the parameters.
            name: logical name of the table (buckets, heads).
            num_buckets: buckets of distances.
            max_distance: distance from which on all share the last bucket.
            bidirectional: whether both directions have buckets of their own.
            heads: which heads are this rank's: those whose features its projections compute.
        """
        # Not that of the whole table, which draws start values.
        LogicalModule.__init__(self)
        self.max_distance = max_distance
        slots.add(self, "weight", name, heads)
        table = bucket_table(num_buckets, max_distance, bidirectional=bidirectional)
        self.register_buffer("table", table.to(self.weight.device), persistent=False)


def self_terms(
    bias: HeadBias, like: Tensor, length: int, documents: Tensor | None, *, causal: bool
) -> Tensor:
    """Return the terms of self-attention for all layers of a stack: distances, and who is seen.

    Args:
        bias: table of the stack.
        like: any tensor with the dtype and the device of the scores.
        length: positions T of whole sequences.
        documents: document of each token (B, T); None = a row is one document.
        causal: whether position t sees positions up to t alone.

    Returns:
        (1 or B, heads of this rank, T, T).
    """
    terms: Tensor = bias(length, like.dtype)
    seen = None if documents is None else document_mask(documents, documents)
    if causal:
        if seen is None:
            seen = torch.ones(length, length, dtype=torch.bool, device=like.device)
        seen = seen.tril()
    return terms if seen is None else hide(terms, seen)


def memory_terms(
    like: Tensor, documents: Tensor | None, memory_documents: Tensor | None
) -> Tensor | None:
    """Return the terms of attention to the encoder: a token sees its own document's source.

    Args:
        like: any tensor with the dtype and the device of the scores.
        documents: document of each token of the target (B, T).
        memory_documents: document of each token of the source (B, S).

    Returns:
        (B, 1, T, S); None where a row is one document.

    Raises:
        ValueError: document ids of one sequence.
    """
    if documents is None and memory_documents is None:
        return None
    if documents is None or memory_documents is None:
        raise ValueError(
            "document ids of one sequence alone; give those of source and target, or neither"
        )
    seen = document_mask(documents, memory_documents)
    return hide(like.new_zeros(()).expand(seen.shape), seen)
