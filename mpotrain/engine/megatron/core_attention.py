"""Scaled dot products of heads, on PyTorch's fused kernels, over a cut sequence too."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional

from mpotrain.engine.megatron.micro import Micro, positions_of_rank


class FusedCoreAttention(MegatronModule):  # type: ignore[misc]
    """Attention of heads, with what a `Micro` says about who sees whom.

    Under context parallelism a rank has the queries of its own positions, and gathers the keys and
    values of all of them in their natural order.

    Attributes:
        is_causal: whether position t sees positions up to t alone, where the `Micro` says nothing.
        is_cross: whether keys belong to the encoder of a sequence-to-sequence network.
        scale: factor on the scores; None = 1 / sqrt(head size).
        dropout: rate at which probabilities are dropped in training.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        """Take what Megatron-core's attention hands to any core attention."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.is_cross = attention_type == "cross"
        self.scale, self.dropout = softmax_scale, float(config.attention_dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attention_bias: Micro | None = None,
        **_: Any,
    ) -> Tensor:
        """Return (T, B, local heads x head size).

        Args:
            query: (T, B, local heads, head size), of this context-parallel rank's positions.
            key: (S, B, local heads, head size), likewise.
            value: likewise.
            attention_mask: nothing; `attention_bias` says what is seen.
            attention_bias: what is seen, and what is added to the scores.
        """
        ranks = parallel_state.get_context_parallel_world_size()
        positions = None
        if ranks > 1:
            rank = parallel_state.get_context_parallel_rank()
            positions = positions_of_rank(len(query) * ranks, ranks, rank, query.device)
            key, value = _gather_positions(key, value, ranks)
        mask = self._mask(attention_bias, positions, len(key))
        rate = self.dropout if self.training else 0.0
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with split_stream(self.config, rate):
            mixed = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=rate,
                is_causal=self.is_causal and mask is None,
                scale=self.scale,
            )
        return mixed.permute(2, 0, 1, 3).flatten(2)

    def _mask(self, micro: Micro | None, positions: Tensor | None, length: int) -> Tensor | None:
        """Return the mask or term of this rank's queries; None = all keys, or `is_causal`.

        Args:
            micro: of whole sequences; its terms of self-attention hide whom they must hide.
            positions: of the queries; None = all.
            length: number of keys S.
        """
        mask = None
        if micro is not None:
            own = micro.seen if micro.terms is None else micro.terms
            mask = micro.memory_terms if self.is_cross else own
        if positions is None:
            return mask
        if mask is not None:
            # A term may be the same for all queries.
            return mask if mask.shape[-2] == 1 else mask.index_select(-2, positions)
        if not self.is_causal:
            return None
        return positions[:, None] >= torch.arange(length, device=positions.device)


def _gather_positions(key: Tensor, value: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of all positions in natural order; gradients flow back summed."""
    group = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=group)
    whole = gathered.index_select(0, _natural_order(len(gathered), ranks, gathered.device))
    size = key.shape[-1]
    return whole[..., :size], whole[..., size:]


# For the same reasons as `positions_of_rank`.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _natural_order(length: int, ranks: int, device: torch.device) -> Tensor:
    """Return where each position lies among the positions of all ranks, one behind the other."""
    held = torch.cat([positions_of_rank(length, ranks, rank) for rank in range(ranks)])
    return held.argsort().to(device)


def split_stream(config: TransformerConfig, rate: float) -> Any:
    """Return a context in which tensor-parallel ranks draw different dropout masks.

    Under sequence parallelism a block draws from that stream throughout: a second fork inside it
    would find a stale state when a layer is computed again in the backward pass.
    """
    if rate == 0.0 or config.sequence_parallel:
        return nullcontext()
    return get_cuda_rng_tracker().fork()
