"""Layer normalisation whose weights may belong to another module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x (..., H) in fp32 or the wider dtype of x.

    Args:
        x: activations.
        weight: (H,).
        bias: (H,).
        eps: added to the variance.

    Returns:
        (..., H) in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = (x.shape[-1],)
    return functional.layer_norm(x.to(dtype), shape, weight.to(dtype), bias.to(dtype), eps).to(
        x.dtype
    )


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with weights of its own, computed as `layer_norm` says."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., H); the result has the dtype of x."""
        return layer_norm(x, self.weight, self.bias, self.eps)
