"""The auxiliaries on one side of the central tensor, merged for all experts at once.

Every expert has its own auxiliaries but the same shapes, so a merge is one batched product over
the experts. A side of the operator is held as (E, d, in modes, out modes, d'): left of the central
tensor (E, 1, iL, jL, d2), right of it (E, d3, iR, jR, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mpotrain.tensor.expert_plan import MergePrecision
from mpotrain.tensor.merge import merge_dtype
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.tree import Merge, Range, merge_order


def product_dtype(
    precision: MergePrecision, dtype: torch.dtype, cores: Sequence[Tensor]
) -> torch.dtype:
    """Return the dtype of products of cores.

    Args:
        precision: what the plan asks for.
        dtype: dtype of x.
        cores: central tensor and auxiliaries.
    """
    return dtype if precision == "compute" else merge_dtype(cores)


def reordered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor in `dtype`, in at most one pass over the memory."""
    if tensor.dtype == dtype:
        return tensor.contiguous()
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


@dataclass(frozen=True)
class Side:
    """The cores first..last of every expert.

    Attributes:
        spec: the operator of one expert.
        first: first core of the side.
        last: last core of the side, inclusive.
    """

    spec: MPOSpec
    first: int
    last: int

    @classmethod
    def left(cls, spec: MPOSpec) -> Side:
        """Return the cores left of the central tensor."""
        return cls(spec, 0, spec.central_index - 1)

    @classmethod
    def right(cls, spec: MPOSpec) -> Side:
        """Return the cores right of the central tensor."""
        return cls(spec, spec.central_index + 1, spec.num_cores - 1)

    @property
    def _merges(self) -> tuple[Merge, ...]:
        return merge_order(self.spec, self.first, self.last)

    def merged(self, cores: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the product of the cores of every expert.

        Args:
            cores: (E, d, i, j, d') for the cores of this side.
            dtype: dtype of the products.

        Returns:
            (E, d, in modes, out modes, d') in `dtype`, contiguous.
        """
        parts = self._leaves(cores, dtype)
        for step in self._merges:
            parts[step.result] = _merge(parts.pop(step.left), parts.pop(step.right))
        (product,) = parts.values()
        return self._split(product).reshape(self._shape(len(product))).contiguous()

    def project(self, gradient: Tensor, cores: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the cores from that of their product.

        Args:
            gradient: (E, d, in modes, out modes, d'), in the dtype of the products.
            cores: (E, d, i, j, d') for the cores of this side.

        Returns:
            One gradient for each core, in its shape and dtype.
        """
        parts = self._leaves(cores, gradient.dtype)
        for step in self._merges[:-1]:
            parts[step.result] = _merge(parts[step.left], parts[step.right])
        whole = gradient.new_empty(self._interleaved(len(gradient)))
        target = self._split(whole)
        target.copy_(gradient.reshape(target.shape))
        found: dict[Range, Tensor] = {(self.first, self.last): whole}
        for step in reversed(self._merges):
            whole = found.pop(step.result)
            left, right = parts[step.left], parts[step.right]
            experts, a, p, b = left.shape
            _, _, q, c = right.shape
            flat = whole.view(experts, a * p, q * c)
            found[step.left] = torch.bmm(flat, right.reshape(experts, b, q * c).mT).view(left.shape)
            found[step.right] = torch.bmm(left.reshape(experts, a * p, b).mT, flat).view(
                right.shape
            )
        return [
            found[k, k].view(core.shape).to(core.dtype)
            for k, core in zip(range(self.first, self.last + 1), cores, strict=True)
        ]

    def _leaves(self, cores: Sequence[Tensor], dtype: torch.dtype) -> dict[Range, Tensor]:
        """Return the cores as (E, d, i*j, d') by range."""
        return {
            (k, k): core.to(dtype).reshape(core.shape[0], core.shape[1], -1, core.shape[4])
            for k, core in zip(range(self.first, self.last + 1), cores, strict=True)
        }

    def _interleaved(self, num_experts: int) -> tuple[int, ...]:
        """Shape (E, d, i_a, j_a, .., i_b, j_b, d') of the product as it is computed."""
        d, modes = self.spec.all_bonds, slice(self.first, self.last + 1)
        pairs = zip(self.spec.in_modes[modes], self.spec.out_modes[modes], strict=True)
        return (num_experts, d[self.first], *chain.from_iterable(pairs), d[self.last + 1])

    def _shape(self, num_experts: int) -> tuple[int, ...]:
        """Shape (E, d, in modes, out modes, d') of the product as it is returned."""
        experts, left, *modes, right = self._interleaved(num_experts)
        i = torch.Size(modes[::2]).numel()
        return (experts, left, i, torch.Size(modes[1::2]).numel(), right)

    def _split(self, product: Tensor) -> Tensor:
        """View the product as (E, d, i_a..i_b, j_a..j_b, d')."""
        apart = product.view(self._interleaved(len(product)))
        count = self.last - self.first + 1
        ins, outs = range(2, 2 + 2 * count, 2), range(3, 3 + 2 * count, 2)
        return apart.permute(0, 1, *ins, *outs, 2 + 2 * count)


def _merge(left: Tensor, right: Tensor) -> Tensor:
    """Contract (E, a, p, b) with (E, b, q, c) to (E, a, p*q, c)."""
    experts, a, p, b = left.shape
    _, _, q, c = right.shape
    product = torch.bmm(left.reshape(experts, a * p, b), right.reshape(experts, b, q * c))
    return product.view(experts, a, p * q, c)
