"""Rows by index, and back: the differentiable permutations of a dispatcher.

Both directions of every function read by index and write in order. The gradients of plain
indexing would add by index, which is neither deterministic on CUDA nor as fast, and would keep
more for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _TakeRows(torch.autograd.Function):
    """One row for each (token, choice) pair in `order`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, _tokens(order, place))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return _sum_of_choices(gradient, None, place), None, None


take_rows: Callable[..., Tensor] = _TakeRows.apply
"""Return rows (S, H): token ``order // k`` of x (N, H). Arguments: x, order (S,), place (N, k)."""


class _CombineRows(torch.autograd.Function):
    """Sum over the choices of each token; keeps the rows only where gates want a gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gates: Tensor | None, order: Tensor, place: Tensor
    ) -> Tensor:
        wants_gates = gates is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if wants_gates else None, gates, order, place)
        return _sum_of_choices(rows, gates, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, gates, order, place = ctx.saved_tensors
        row_gradient = gate_gradient = None
        if ctx.needs_input_grad[0]:
            row_gradient = gradient.index_select(0, _tokens(order, place))
            if gates is not None:
                factors = gates.reshape(-1).index_select(0, order)
                row_gradient = (row_gradient * factors[:, None]).to(gradient.dtype)
        if rows is not None:
            source = _with_zero_row(rows, place)
            columns = [
                (source.index_select(0, _bounded(place[:, c], rows)).to(gates.dtype) * gradient)
                .sum(1)
                .to(gates.dtype)
                for c in range(place.shape[1])
            ]
            gate_gradient = torch.stack(columns, dim=1)
        return row_gradient, gate_gradient, None, None


combine_rows: Callable[..., Tensor] = _CombineRows.apply
"""Return y (N, H): for each token the sum over c of ``gates[:, c] * rows[place[:, c]]``, where
places of S and above contribute zero. Arguments: rows (S, H), gates (N, k) or None, order (S,),
place (N, k)."""


class _ReorderRows(torch.autograd.Function):
    """A permutation whose gradient is read through the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return gradient.index_select(0, place), None, None


reorder_rows: Callable[..., Tensor] = _ReorderRows.apply
"""Return ``rows[order]``. Arguments: rows (M, H), order (M,), its inverse (M,)."""


def _tokens(order: Tensor, place: Tensor) -> Tensor:
    """Return the token of each pair."""
    return torch.div(order, place.shape[1], rounding_mode="floor")


def _sum_of_choices(rows: Tensor, gates: Tensor | None, place: Tensor) -> Tensor:
    """Return for each token the sum of its rows times gates, first choice first, in fp32."""
    source = _with_zero_row(rows, place)
    if gates is None and place.shape[1] == 1:
        return source.index_select(0, _bounded(place[:, 0], rows))
    dtype = torch.promote_types(torch.float32, rows.dtype)
    total: Tensor | None = None
    for c in range(place.shape[1]):
        term = source.index_select(0, _bounded(place[:, c], rows)).to(dtype)
        if gates is not None:
            term = term * gates[:, c : c + 1]
        total = term if total is None else total.add_(term)
    if total is None:
        raise ValueError("tokens need at least one choice")
    return total.to(rows.dtype)


def _with_zero_row(rows: Tensor, place: Tensor) -> Tensor:
    """Return rows, with a row of zeros behind them where pairs were dropped."""
    return rows if len(rows) == place.numel() else functional.pad(rows, (0, 0, 0, 1))


def _bounded(place: Tensor, rows: Tensor) -> Tensor:
    """Point all dropped pairs to the row of zeros."""
    return place.clamp(max=len(rows))
