"""The plan "grouped": rebuild the experts that have rows, a few at a time, and forget them.

Backward rebuilds every expert once more. Its half, the central tensor merged with one side, serves
the projection of dW_e on the cores and then the rebuilding of W_e for dx, so that no more than one
chunk of dense matrices is alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpotrain.tensor.expert_plan import ExpertPlan
from mpotrain.tensor.expert_sides import Side, product_dtype, reordered
from mpotrain.tensor.experts import ExpertShape
from mpotrain.tensor.grouped import (
    add_to_rows,
    row_ranges,
    rows_times,
    sum_of_rows,
    weight_gradients,
)


@dataclass(frozen=True)
class _Chunk:
    """Experts that are rebuilt together: neighbours among those that have rows.

    Attributes:
        experts: which ones, as an index of the expert axis (a slice where they are adjacent).
        counts: rows of each of them.
        rows: all their rows.
    """

    experts: slice | list[int]
    counts: list[int]
    rows: slice


def _chunks(counts: Sequence[int], size: int) -> Iterator[_Chunk]:
    ranges = list(row_ranges(counts))
    for first in range(0, len(ranges), size):
        part = ranges[first : first + size]
        experts = [expert for expert, _, _ in part]
        adjacent = experts[-1] - experts[0] == len(experts) - 1
        yield _Chunk(
            experts=slice(experts[0], experts[-1] + 1) if adjacent else experts,
            counts=[end - start for _, start, end in part],
            rows=slice(part[0][1], part[-1][2]),
        )


class _Rebuilder:
    """Rebuilds experts from the central tensor and their merged sides, and projects on these.

    With c experts in a chunk, the half is C with the left sides, (c, iL jL i3 j3, d3), or with the
    right sides, (c, d2, i3 j3 iR jR).
    """

    def __init__(
        self, plan: ExpertPlan, dtype: torch.dtype, central: Tensor, auxiliaries: Sequence[Tensor]
    ) -> None:
        self.shape: ExpertShape = plan.shape
        self.from_left = plan.first == "left"
        self.sides = Side.left(plan.spec), Side.right(plan.spec)
        cut = plan.spec.central_index
        self.cores = auxiliaries[:cut], auxiliaries[cut:]
        self.central = reordered(central, dtype)
        s, experts = self.shape, len(auxiliaries[0])
        left, right = (
            side.merged(cores, dtype) for side, cores in zip(self.sides, self.cores, strict=True)
        )
        self.left = left.view(experts, s.left_in * s.left_out, s.left_bond)
        self.right = right.view(experts, s.right_bond, s.right_in * s.right_out)

    def half(self, experts: slice | list[int]) -> Tensor:
        """Merge the central tensor with the sides that come first."""
        s = self.shape
        if self.from_left:
            left = self.left[experts]
            product = torch.mm(left.view(-1, s.left_bond), self.central.view(s.left_bond, -1))
            return product.view(len(left), -1, s.right_bond)
        right = self.right[experts]
        flat = self.central.view(1, -1, s.right_bond).expand(len(right), -1, -1)
        return torch.bmm(flat, right).view(len(right), s.left_bond, -1)

    def weight(self, half: Tensor, experts: slice | list[int], dtype: torch.dtype) -> Tensor:
        """Return W_e (c, I, J) in `dtype` from the half."""
        s = self.shape
        if self.from_left:
            product = torch.bmm(half, self.right[experts])
        else:
            product = torch.bmm(self.left[experts], half)
        interleaved = product.view(
            -1, s.left_in, s.left_out, s.central_in, s.central_out, s.right_in, s.right_out
        )
        matrix = reordered(interleaved.permute(0, 1, 3, 5, 2, 4, 6), dtype)
        return matrix.view(len(half), s.left_in * s.central_in * s.right_in, -1)

    def product_gradient(self, weight_gradient: Tensor) -> Tensor:
        """Reorder dW_e (c, I, J) to the gradient (c, modes) of the product of all cores."""
        s = self.shape
        apart = weight_gradient.view(
            -1, s.left_in, s.central_in, s.right_in, s.left_out, s.central_out, s.right_out
        )
        product = reordered(apart.permute(0, 1, 4, 2, 5, 3, 6), self.left.dtype)
        return product.view(len(weight_gradient), -1)

    def project(
        self, gradient: Tensor, half: Tensor, experts: slice | list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of C (summed over the chunk) and of the left and right sides."""
        s = self.shape
        left, right = self.left[experts], self.right[experts]
        if self.from_left:
            flat = gradient.view(len(half), half.shape[1], -1)
            d_right = torch.bmm(half.mT, flat)
            d_half = torch.bmm(flat, right.mT).view(-1, self.central[0].numel())
            d_left = torch.mm(d_half, self.central.view(s.left_bond, -1).t()).view(left.shape)
            d_central = torch.mm(left.view(-1, s.left_bond).t(), d_half)
        else:
            flat = gradient.view(len(half), left.shape[1], -1)
            d_left = torch.bmm(flat, half.mT)
            d_half = torch.bmm(left.mT, flat).view(len(half), -1, right.shape[2])
            middle = self.central.view(1, -1, s.right_bond).expand(len(half), -1, -1)
            d_right = torch.bmm(middle.mT, d_half)
            d_central = torch.bmm(d_half, right.mT).sum(0)
        return d_central.view(self.central.shape), d_left, d_right


class GroupedLinear(torch.autograd.Function):
    """y = x W_e + b_e with experts rebuilt chunk by chunk; keeps x and the cores."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        plan: ExpertPlan,
        counts: tuple[int, ...],
        *cores: Tensor,
    ) -> Tensor:
        """Return y (M, J) for x (M, I); `cores` are the central tensor and the auxiliaries."""
        ctx.plan, ctx.counts, ctx.bias_dtype = plan, counts, None if bias is None else bias.dtype
        ctx.save_for_backward(x, *cores)
        dtype = product_dtype(plan.merge_precision, x.dtype, cores)
        rebuilder = _Rebuilder(plan, dtype, cores[0], cores[1:])
        y = x.new_empty(len(x), plan.spec.out_features)
        for chunk in _chunks(counts, plan.chunk):
            weight = rebuilder.weight(rebuilder.half(chunk.experts), chunk.experts, x.dtype)
            rows_times(x[chunk.rows], weight, chunk.counts, y[chunk.rows])
        if bias is not None:
            add_to_rows(y, bias, counts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the bias, the central tensor and the auxiliaries."""
        plan: ExpertPlan = ctx.plan
        x, *cores = ctx.saved_tensors
        dtype = product_dtype(plan.merge_precision, x.dtype, cores)
        rebuilder = _Rebuilder(plan, dtype, cores[0], cores[1:])
        wants_x, wants_cores = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        # Sums over experts stay in fp32, also where the single products do not.
        wide = torch.promote_types(dtype, torch.float32)
        central = torch.zeros(cores[0].shape, dtype=wide, device=x.device)
        left, right = torch.zeros_like(rebuilder.left), torch.zeros_like(rebuilder.right)
        dx = torch.empty_like(x) if wants_x else None
        for chunk in _chunks(ctx.counts, plan.chunk):
            rows, experts = chunk.rows, chunk.experts
            half = rebuilder.half(experts)
            if wants_cores:
                product = rebuilder.product_gradient(
                    weight_gradients(gradient[rows], x[rows], chunk.counts)
                )
                d_central, left[experts], right[experts] = rebuilder.project(product, half, experts)
                _accumulate(central, d_central)
                del product, d_central
            if dx is not None:
                weight = rebuilder.weight(half, experts, x.dtype)
                rows_times(gradient[rows], weight.mT, chunk.counts, dx[rows])
                del weight
        found: list[Tensor | None] = [None] * len(cores)
        if wants_cores:
            found = [central.to(cores[0].dtype), *_side_gradients(rebuilder, left, right)]
        db = sum_of_rows(gradient, ctx.counts, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return (dx, db, None, None, *found)


_BLOCK = 1 << 16
"""Elements of a sum that are widened at a time: they stay in the cache."""


def _accumulate(total: Tensor, part: Tensor) -> None:
    """Add `part` to `total`, which may be wider and is contiguous like it.

    A CPU adds tensors of two dtypes by widening one of them as a whole first, into fresh memory;
    blocks of it stay in the cache.
    """
    if total.dtype == part.dtype or total.is_cuda:
        total += part
        return
    wide, narrow = torch.split(total.view(-1), _BLOCK), torch.split(part.reshape(-1), _BLOCK)
    for block, addend in zip(wide, narrow, strict=True):
        block += addend


def _side_gradients(rebuilder: _Rebuilder, left: Tensor, right: Tensor) -> list[Tensor]:
    s = rebuilder.shape
    apart = (
        left.view(-1, 1, s.left_in, s.left_out, s.left_bond),
        right.view(-1, s.right_bond, s.right_in, s.right_out, 1),
    )
    return [
        gradient
        for side, cores, whole in zip(rebuilder.sides, rebuilder.cores, apart, strict=True)
        for gradient in side.project(whole, cores)
    ]


grouped_linear: Callable[..., Tensor] = GroupedLinear.apply
"""Typed entry of `GroupedLinear`: (x, bias, plan, counts, central, *auxiliaries)."""
