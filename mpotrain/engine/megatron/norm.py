"""Normalisations of a chunk: the arithmetic of `mpotrain.nn`, with parameters from slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.engine.megatron.slots import LogicalModule
from mpotrain.engine.megatron.sources import NormSource
from mpotrain.nn.norm import layer_norm

NormKernel = Callable[[LogicalModule, TransformerConfig, float], nn.Module]
"""Makes what computes a normalisation, given its owner, the configuration and what is added to the
variance: a module with parameters `weight` and, where the owner has one, `bias`."""


class Norm(LogicalModule):
    """Layer normalisation, or an RMS normalisation where there are no shifts.

    Under sequence parallelism a rank normalises its own positions alone, so it computes a part of
    the gradient of gains and shifts.

    Attributes:
        eps: added to the variance.
    """

    def __init__(
        self,
        source: NormSource,
        kernel: NormKernel | None = None,
        *,
        config: TransformerConfig,
        **_: Any,
    ) -> None:
        """Make the parameters.

        Args:
            source: names and the number added to the variance; it goes before Megatron-core's.
            kernel: makes what computes it in place of PyTorch.
            config: says whether positions are split over the tensor-parallel ranks.
        """
        super().__init__()
        self.eps = source.eps
        is_partial = bool(config.sequence_parallel)
        self._names = ["weight"] if source.bias is None else ["weight", "bias"]
        source.slots.add(self, "weight", source.weight, is_partial=is_partial)
        if source.bias is not None:
            source.slots.add(self, "bias", source.bias, is_partial=is_partial)
        # In a tuple, so that no parameter is registered a second time.
        self._kernels = () if kernel is None else (kernel(self, config, self.eps),)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., H); the result has the dtype of x."""
        tensors = [self.read(name) for name in self._names]
        for kernel in self._kernels:
            if x.dtype == tensors[0].dtype:
                return self._by_kernel(kernel, tensors, x)
        if self.owns("bias"):
            weight, bias = tensors
            return layer_norm(x, weight, bias, self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = tensors[0].to(dtype)
        return functional.rms_norm(x.to(dtype), weight.shape, weight, self.eps).to(x.dtype)

    def _by_kernel(self, kernel: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        # The kernel keeps the parameters: transformer-engine reads the gains from its module once
        # more in the backward pass, so a call with tensors put in for its length would go wrong.
        for name, tensor in zip(self._names, tensors, strict=True):
            setattr(kernel, name, tensor)
        result: Tensor = kernel(x)
        return result


def norm(source: NormSource, kernel: NormKernel | None = None) -> ModuleSpec:
    """Return the specification of a normalisation.

    Args:
        source: names and the number added to the variance.
        kernel: makes what computes it; None = PyTorch.
    """
    return ModuleSpec(Norm, params={"source": source, "kernel": kernel})
