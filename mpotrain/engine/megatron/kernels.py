"""Parts of the layers that transformer-engine computes, where the network and the setting fit them.

Parameters, masks and the layout stay those of this engine: a kernel is handed what it computes
with, and what it cannot compute is left to PyTorch.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from mpotrain.engine.megatron.attention import CoreBuilder
from mpotrain.engine.megatron.core_attention import FusedCoreAttention
from mpotrain.engine.megatron.extensions import Extensions, core_attention_class, norm_class
from mpotrain.engine.megatron.micro import Micro
from mpotrain.engine.megatron.norm import NormKernel
from mpotrain.engine.megatron.slots import LogicalModule

ATTENTION_DTYPES = (torch.bfloat16, torch.float16)
"""What the fused and flash kernels of transformer-engine compute in. Without these it multiplies
matrices of scores out, and refuses context parallelism."""
LARGEST_HEAD = 128
"""Features of a head, a multiple of 8, up to which they exist on every GPU since Ampere."""


@dataclass(frozen=True)
class Kernels:
    """What computes parts of a chunk's layers in place of PyTorch; None = nothing does.

    Attributes:
        core: builds attentions of a sequence to itself.
        norm: builds normalisations.
    """

    core: CoreBuilder | None = None
    norm: NormKernel | None = None


NO_KERNELS = Kernels()


def choose_kernels(extensions: Extensions, config: TransformerConfig) -> Kernels:
    """Return the kernels that are there and fit the network.

    Args:
        extensions: setting of the engine.
        config: of megatron-core's modules.
    """
    attention, norms = core_attention_class(extensions), norm_class(extensions)
    core: CoreBuilder | None = None
    if attention is not None and _fits_attention(config):
        chosen = attention  # a name of its own, which no longer may be None

        def core(**given: Any) -> nn.Module:
            return KernelCoreAttention(kernel=chosen, **given)

    return Kernels(core, None if norms is None else _NormMaker(norms))


def _fits_attention(config: TransformerConfig) -> bool:
    head_size = int(config.kv_channels)
    fits = head_size % 8 == 0 and head_size <= LARGEST_HEAD
    return fits and config.params_dtype in ATTENTION_DTYPES


class KernelCoreAttention(MegatronModule):  # type: ignore[misc]
    """Attention of transformer-engine where a micro-batch has no mask or term, else PyTorch's.

    Under context parallelism transformer-engine passes keys and values around the ranks itself; it
    expects the positions where they are, in Megatron-core's zigzag.

    Attributes:
        kernel: megatron-core's wrapper of transformer-engine.
        own: attention on PyTorch's kernels.
        mask_type: which keys a query sees where the micro-batch says nothing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        kernel: type[Any],
        **given: Any,
    ) -> None:
        """Build both with what Megatron-core's attention hands to any core attention.

        Args:
            config: of the chunk.
            layer_number: of the layer, from 1.
            attn_mask_type: causal or none.
            attention_type: "self" or "cross".
            kernel: class of the wrapper.
            given: scale, process groups and the way of communication under context parallelism.
        """
        super().__init__(config=config)
        self.mask_type = attn_mask_type
        settled = (config, layer_number, attn_mask_type, attention_type)
        self.kernel = kernel(*settled, **given)
        self.own = FusedCoreAttention(*settled, **given)

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
        """Return (T, B, local heads x head size); arguments as of `FusedCoreAttention`."""
        if _is_plain(attention_bias):
            mixed: Tensor = self.kernel(query, key, value, None, attn_mask_type=self.mask_type)
            return mixed
        result: Tensor = self.own(query, key, value, attention_bias=attention_bias)
        return result


def _is_plain(micro: Micro | None) -> bool:
    if micro is None:
        return True
    return micro.seen is None and micro.terms is None and micro.memory_terms is None


@dataclass(frozen=True)
class _NormMaker:
    """Makes kernels of normalisations that compute with the parameters of this engine.

    Attributes:
        maker: megatron-core's maker of transformer-engine's normalisations.
    """

    maker: type[Any]

    def __call__(self, owner: LogicalModule, config: TransformerConfig, eps: float) -> nn.Module:
        """Return a kernel of the kind and size of `owner`; see `NormKernel`."""
        settings = copy(config)
        settings.normalization = "LayerNorm" if owner.owns("bias") else "RMSNorm"
        size = len(owner.read("weight"))
        made: nn.Module = self.maker(config=settings, hidden_size=size, eps=eps)
        return made
