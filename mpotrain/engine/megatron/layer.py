"""A transformer layer: the residual sums of the logical network around attention and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mpotrain.engine.megatron.attention import cross_attention, self_attention
from mpotrain.engine.megatron.feed_forward import feed_forward
from mpotrain.engine.megatron.kernels import NO_KERNELS, Kernels
from mpotrain.engine.megatron.micro import Micro
from mpotrain.engine.megatron.mixture import mixture_layer
from mpotrain.engine.megatron.norm import norm
from mpotrain.engine.megatron.sources import LayerSource, MixtureSource

Part = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""What is added to the residual stream: maps (s, B, H) to the like, and a bias to be added."""


class LogicalLayer(TransformerLayer):  # type: ignore[misc]
    """`x + f(norm(x))`, or `norm(a x + f(x))`, for f attention, then feed-forward or mixture.

    Attributes:
        source: what the layer is made of.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        source: LayerSource,
        pg_collection: ProcessGroupCollection | None = None,
        **given: Any,
    ) -> None:
        """Build the layer.

        Args:
            config: of the chunk.
            submodules: norms and attentions.
            source: what the layer is made of.
            pg_collection: process groups; None = those of the started grid.
            given: what else Megatron-core's layer takes.
        """
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(config, submodules, pg_collection=pg_collection, **given)
        self.source = source
        # Megatron-core knows its own classes alone here, and would warn of any other.
        self.mlp = _feed_forward(source, config, pg_collection)
        self.is_moe_layer = isinstance(self.mlp, MoELayer)
        if self.is_moe_layer:
            self.mlp.set_layer_number(self.layer_number)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        *,
        attention_bias: Micro | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the layer.

        Args:
            hidden_states: (s, B, H).
            attention_mask: nothing; `attention_bias` says what is seen.
            context: what the encoder returned, for cross-attention.
            context_mask: nothing, likewise.
            attention_bias: what accompanies the micro-batch.

        Returns:
            (s, B, H), and `context` as it came.
        """
        if self.source.recompute and self.training and torch.is_grad_enabled():
            states = get_cuda_rng_tracker().get_states()

            def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
                return nullcontext(), _random_streams(states)

            # Not Megatron-core's own checkpoint: it runs a backward pass of its own for each
            # layer, in which a tensor that several layers use would be ready more than once.
            output = checkpoint(
                self._compute,
                hidden_states,
                context,
                attention_bias,
                use_reentrant=False,
                context_fn=contexts,
            )
        else:
            output = self._compute(hidden_states, context, attention_bias)
        return output, context

    def _compute(self, x: Tensor, context: Tensor | None, micro: Micro | None) -> Tensor:
        def attend(y: Tensor) -> tuple[Tensor, Tensor | None]:
            told: tuple[Tensor, Tensor | None] = self.self_attention(
                y, attention_mask=None, attention_bias=micro
            )
            return told

        def look_back(y: Tensor) -> tuple[Tensor, Tensor | None]:
            told: tuple[Tensor, Tensor | None] = self.cross_attention(
                y, attention_mask=None, key_value_states=context, attention_bias=micro
            )
            return told

        x = self._residual(x, self.input_layernorm, attend)
        if self.source.cross_attention is not None:
            x = self._residual(x, self.pre_cross_attn_layernorm, look_back)
        return self._residual(x, self.pre_mlp_layernorm, lambda y: self.mlp(y, micro))

    def _residual(self, x: Tensor, norm_layer: nn.Module, part: Part) -> Tensor:
        is_post, scale = self.source.is_post_norm, self.source.residual_scale
        y, bias = part(x if is_post else norm_layer(x))
        y = functional.dropout(y if bias is None else y + bias, self.hidden_dropout, self.training)
        total = (x if scale == 1.0 else scale * x) + y
        result: Tensor = norm_layer(total) if is_post else total
        return result


@contextmanager
def _random_streams(states: dict[str, Tensor]) -> Iterator[None]:
    """Put the named random streams to `states`, and back behind; torch sees to the default one."""
    tracker = get_cuda_rng_tracker()
    current = tracker.get_states()
    tracker.set_states(dict(states))
    try:
        yield
    finally:
        tracker.set_states(current)


def _feed_forward(
    source: LayerSource, config: TransformerConfig, groups: ProcessGroupCollection
) -> Any:
    if isinstance(source.ffn, MixtureSource):
        return build_module(mixture_layer(source.ffn), config=config, pg_collection=groups)
    return build_module(feed_forward(source.ffn), config=config)


def layer_spec(source: LayerSource, kernels: Kernels = NO_KERNELS) -> ModuleSpec:
    """Return the specification of a layer.

    Args:
        source: what the layer is made of.
        kernels: compute parts of it in place of PyTorch.
    """
    crosses: dict[str, ModuleSpec] = {}
    if source.cross_attention is not None:
        if source.norm_cross is None:
            raise ValueError("a layer with cross-attention has a norm for it")
        crosses = {
            "pre_cross_attn_layernorm": norm(source.norm_cross, kernels.norm),
            "cross_attention": cross_attention(source.cross_attention, kernels.core),
        }
    return ModuleSpec(
        LogicalLayer,
        params={"source": source},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm(source.norm_1, kernels.norm),
            self_attention=self_attention(source.attention, kernels.core),
            pre_mlp_layernorm=norm(source.norm_2, kernels.norm),
            mlp=IdentityOp,
            **crosses,
        ),
    )


def layer_block(
    config: TransformerConfig,
    layers: Mapping[int, LayerSource],
    kernels: Kernels,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> TransformerBlock:
    """Build the layers of a chunk of a pipeline, without a last norm.

    Args:
        config: of megatron-core's modules.
        layers: sources by number, in their order.
        kernels: compute parts of the layers in place of PyTorch.
        pre_process: whether the chunk is the first.
        post_process: whether it is the last.
        vp_stage: its number among the chunks of the stage; None where there is one.
    """
    return TransformerBlock(
        config,
        TransformerBlockSubmodules([layer_spec(source, kernels) for source in layers.values()]),
        post_layer_norm=False,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
