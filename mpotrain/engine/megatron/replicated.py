"""Layers that every tensor-parallel rank holds whole and computes alike.

They work on hidden states that are the same on all those ranks, so the gradients of their
parameters come out whole and the same on all of them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mpotrain.engine.megatron.slots import LogicalModule, Slots
from mpotrain.models.sites import Site
from mpotrain.nn.norm import layer_norm


class ReplicatedLinear(LogicalModule):
    """`y = x W + b` with a dense W; computes in the dtype of x."""

    def __init__(self, slots: Slots, site: Site) -> None:
        """Make the parameters.

        Args:
            slots: of the chunk.
            site: a dense matrix.

        Raises:
            TypeError: the site is an operator.
        """
        super().__init__()
        if site.spec is not None:
            raise TypeError(f"{site.name} is an operator; layers computed alike are dense")
        slots.add(self, "weight", f"{site.name}.weight")
        if site.bias:
            slots.add(self, "bias", f"{site.name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) to (..., J)."""
        bias = self.read("bias").to(x.dtype) if self.owns("bias") else None
        return functional.linear(x, self.read("weight").to(x.dtype), bias)


class ReplicatedNorm(LogicalModule):
    """Layer normalisation, see `mpotrain.nn.norm`."""

    def __init__(self, slots: Slots, name: str, eps: float) -> None:
        """Make the parameters.

        Args:
            slots: of the chunk.
            name: logical name of the norm.
            eps: added to the variance.
        """
        super().__init__()
        self.eps = eps
        slots.add(self, "weight", f"{name}.weight")
        slots.add(self, "bias", f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., H); the result has the dtype of x."""
        return layer_norm(x, self.read("weight"), self.read("bias"), self.eps)
