"""The feed-forward layer: two linear layers around an activation."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional

from mpotrain.engine.megatron.core_attention import split_stream
from mpotrain.engine.megatron.layers import column_linear, row_linear
from mpotrain.engine.megatron.micro import Micro
from mpotrain.engine.megatron.sources import FeedForwardSource
from mpotrain.nn.activation import activation


class FeedForward(MLP):  # type: ignore[misc]
    """Two linear layers around an activation, and dropout behind it where the network has one.

    Attributes:
        dropout: rate behind the activation; the features there are split over the ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        source: FeedForwardSource,
        **_: Any,
    ) -> None:
        """Build the layers.

        Args:
            config: of the chunk.
            submodules: of the two layers.
            source: what lies between them.
        """
        super().__init__(
            config,
            submodules,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        self.dropout = source.dropout
        self._between = activation(source.activation)

    def forward(
        self, x: Tensor, micro: Micro | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map x (s, B, H) to (s, B, H).

        Args:
            x: hidden states.
            micro: nothing that is needed here; mixtures of experts take one in this place.

        Returns:
            The result, and the bias that is to be added to it.
        """
        inner, bias = self.linear_fc1(x)
        inner = self._between(inner if bias is None else inner + bias)
        rate = self.dropout if self.training else 0.0
        with split_stream(self.config, rate):
            inner = functional.dropout(inner, rate)
        result: tuple[Tensor, Tensor | None] = self.linear_fc2(inner)
        return result


def feed_forward(source: FeedForwardSource) -> ModuleSpec:
    """Return the specification of a feed-forward layer."""
    return ModuleSpec(
        FeedForward,
        params={"source": source},
        submodules=MLPSubmodules(
            linear_fc1=column_linear(source.c_fc), linear_fc2=row_linear(source.c_proj)
        ),
    )
