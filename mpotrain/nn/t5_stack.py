"""Encoder or decoder of T5: blocks that share one table of relative positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mpotrain.nn.attention import document_mask
from mpotrain.nn.relative_bias import RelativeBias
from mpotrain.nn.t5_block import RMSNorm, T5Block


def hide(terms: Tensor, seen: Tensor) -> Tensor:
    """Return the terms of attention scores with those of unseen keys at the least finite number.

    A finite number leaves a query without any key (padding of a target whose source has none) with
    even weights; of minus infinity kernels make zeros or NaN.

    Args:
        terms: (1, heads, T, S).
        seen: bool, broadcasts with `terms`.
    """
    return terms.masked_fill(~seen, torch.finfo(terms.dtype).min)


class T5Stack(nn.Module):
    """Blocks, one table of relative positions for all of them, and a last normalisation.

    Attributes:
        relative_bias: terms of the scores of self-attention.
        blocks: `T5Block`s, all with cross-attention or all without.
        final_norm: of the last hidden state.
    """

    def __init__(
        self,
        relative_bias: RelativeBias,
        blocks: Sequence[T5Block],
        final_norm: RMSNorm,
        *,
        causal: bool,
        dropout: float,
        checkpointing: bool,
    ) -> None:
        """Join the parts.

        Args:
            relative_bias: of self-attention.
            blocks: from first to last.
            final_norm: of the last hidden state.
            causal: whether position t sees positions up to t alone.
            dropout: rate at the start and at the end of the stack.
            checkpointing: recompute the blocks in the backward pass.
        """
        super().__init__()
        self.relative_bias = relative_bias
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.causal, self.dropout, self.checkpointing = causal, dropout, checkpointing

    def forward(
        self,
        x: Tensor,
        documents: Tensor | None = None,
        memory: Tensor | None = None,
        memory_documents: Tensor | None = None,
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Map embedded tokens x (B, T, H) to normalised hidden states (B, T, H).

        Args:
            x: embedded tokens.
            documents: document of each token (B, T); None = a row is one document.
            memory: what the encoder returns (B, S, H), for a decoder.
            memory_documents: document of each of its tokens (B, S).

        Returns:
            The hidden states, and what each mixture of experts tells, in block order.
        """
        mask = self._self_terms(x, documents)
        memory_mask = None
        if documents is not None and memory_documents is not None:
            seen = document_mask(documents, memory_documents)
            memory_mask = hide(x.new_zeros(()).expand(seen.shape), seen)
        x = functional.dropout(x, self.dropout, self.training)
        mixtures = []
        for block in self.blocks:
            if self.checkpointing and self.training:
                x, told = checkpoint(block, x, mask, memory, memory_mask, use_reentrant=False)
            else:
                x, told = block(x, mask, memory, memory_mask)
            if told:
                mixtures.append(told)
        normalised: Tensor = self.final_norm(x)
        return functional.dropout(normalised, self.dropout, self.training), mixtures

    def _self_terms(self, x: Tensor, documents: Tensor | None) -> Tensor:
        """Return the term of self-attention for all blocks: distances, and who is seen."""
        length = x.shape[1]
        terms: Tensor = self.relative_bias(length, x.dtype)
        seen = None if documents is None else document_mask(documents, documents)
        if self.causal:
            if seen is None:
                seen = torch.ones(length, length, dtype=torch.bool, device=x.device)
            seen = seen.tril()
        return terms if seen is None else hide(terms, seen)
