"""Normalisations of a chunk: the arithmetic of `mpotrain.nn`, with parameters from slots."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional

from mpotrain.engine.megatron.slots import LogicalModule
from mpotrain.engine.megatron.sources import NormSource
from mpotrain.nn.norm import layer_norm


class Norm(LogicalModule):
    """Layer normalisation, or an RMS normalisation where there are no shifts.

    Under sequence parallelism a rank normalises its own positions alone, so it computes a part of
    the gradient of gains and shifts.

    Attributes:
        eps: added to the variance.
    """

    def __init__(self, source: NormSource, config: TransformerConfig, **_: Any) -> None:
        """Make the parameters.

        Args:
            source: names and the number added to the variance; it goes before Megatron-core's.
            config: says whether positions are split over the tensor-parallel ranks.
        """
        super().__init__()
        self.eps = source.eps
        is_partial = bool(config.sequence_parallel)
        source.slots.add(self, "weight", source.weight, is_partial=is_partial)
        if source.bias is not None:
            source.slots.add(self, "bias", source.bias, is_partial=is_partial)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., H); the result has the dtype of x."""
        if self.owns("bias"):
            return layer_norm(x, self.read("weight"), self.read("bias"), self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.read("weight").to(dtype)
        return functional.rms_norm(x.to(dtype), weight.shape, weight, self.eps).to(x.dtype)


def norm(source: NormSource) -> ModuleSpec:
    """Return the specification of a normalisation."""
    return ModuleSpec(Norm, params={"source": source})
