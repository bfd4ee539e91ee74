"""Attention with the projections of the logical network: one fused layer, or one for each part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from mpotrain.engine.megatron.core_attention import FusedCoreAttention
from mpotrain.engine.megatron.layers import ColumnLinear, column_linear, row_linear
from mpotrain.engine.megatron.sources import AttentionSource, LinearSource

CoreBuilder = Callable[..., nn.Module]
"""Builds a core attention from the arguments that Megatron-core's attention gives it."""


class Projections(nn.Module):
    """Layers in front of the heads: one for all parts (queries, keys, values), or one for each.

    A fused layer keeps the logical order of its features, (part, head, feature). It is cut by a
    period that divides a part into whole heads, so what a rank has is in that order, too.

    Attributes:
        layers: column-parallel layers.
        num_parts: what the features of all layers are split into.
        head_size: features of a head.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        sources: tuple[LinearSource, ...],
        num_parts: int,
        config: TransformerConfig,
        init_method: Any,
        **_: Any,
    ) -> None:
        """Build the layers with the arguments of a column-parallel one.

        Args:
            input_size: features of hidden states.
            output_size: features of all parts together.
            sources: of the layers.
            num_parts: parts of the features.
            config: of the chunk.
            init_method: what the interface of linear layers asks for.
        """
        super().__init__()
        self.num_parts, self.head_size = num_parts, int(config.kv_channels)
        self.layers = nn.ModuleList(
            build_module(
                column_linear(source),
                input_size,
                output_size // len(sources),
                config=config,
                init_method=init_method,
                gather_output=False,
                bias=source.bias is not None,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name="qkv",
                tp_group=parallel_state.get_tensor_model_parallel_group(),
            )
            for source in sources
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map x (s, B, H) to one (T, B, local heads, head size) for each part."""
        first = cast("ColumnLinear", self.layers[0])
        entered = first.enter(x)
        outputs = [layer(entered)[0] for layer in self.layers]
        each = self.num_parts // len(outputs)
        parts: list[Tensor] = []
        for y in outputs:
            parts.extend(y.view(*y.shape[:2], each, -1, self.head_size).unbind(2))
        return tuple(parts)

    def backward_dw(self) -> None:
        """Do nothing: the layers compute gradients of weights with those of the input."""


class LogicalSelfAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention in the logical layout of the network."""

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each (T, B, local heads, head size)."""
        result: tuple[Tensor, ...] = self.linear_qkv(hidden_states)
        return result


class LogicalCrossAttention(CrossAttention):  # type: ignore[misc]
    """Attention to an encoder in the logical layout of the network."""

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor, **_: Any
    ) -> tuple[Tensor, ...]:
        """Return queries of the sequence, keys and values of what the encoder returned."""
        result: tuple[Tensor, ...] = (
            *self.linear_q(hidden_states),
            *self.linear_kv(key_value_states),
        )
        return result


def self_attention(source: AttentionSource, core: CoreBuilder | None = None) -> ModuleSpec:
    """Return the specification of self-attention.

    Args:
        source: one fused layer, or the layers of queries, keys and values; and the layer behind.
        core: builds the core attention; None = PyTorch's kernels. It finds a `Micro` in the
            argument `attention_bias` of its forward pass.
    """
    return ModuleSpec(
        LogicalSelfAttention,
        params={"attn_mask_type": _mask_type(source)},
        submodules=SelfAttentionSubmodules(
            linear_qkv=_projections(source.projections, 3),
            core_attention=_core(source, core),
            linear_proj=row_linear(source.out),
        ),
    )


def cross_attention(source: AttentionSource, core: CoreBuilder | None = None) -> ModuleSpec:
    """Return the specification of attention to an encoder; arguments as of `self_attention`."""
    query, key, value = source.projections
    return ModuleSpec(
        LogicalCrossAttention,
        params={"attn_mask_type": _mask_type(source)},
        submodules=CrossAttentionSubmodules(
            linear_q=_projections((query,), 1),
            linear_kv=_projections((key, value), 2),
            core_attention=_core(source, core),
            linear_proj=row_linear(source.out),
        ),
    )


def _mask_type(source: AttentionSource) -> AttnMaskType:
    return AttnMaskType.causal if source.causal else AttnMaskType.no_mask


def _projections(sources: tuple[LinearSource, ...], num_parts: int) -> ModuleSpec:
    return ModuleSpec(Projections, params={"sources": sources, "num_parts": num_parts})


def _core(source: AttentionSource, core: CoreBuilder | None) -> CoreBuilder:
    """Return a builder that puts the scale of this attention in place of the configuration's."""
    build: CoreBuilder = FusedCoreAttention if core is None else core

    def scaled(**given: Any) -> nn.Module:
        return build(**{**given, "softmax_scale": source.scale})

    return scaled
