"""Products of rows that are sorted by expert with a matrix for each expert.

The rows of expert e stand together, `counts[e]` of them. On CUDA in bf16 one grouped kernel does
all experts where its alignment rules hold; elsewhere there is one product for each expert that
has rows. Nothing here scatters, so that the results do not depend on any order of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_ALIGNMENT = 8
"""Rows of the grouped kernel's operands must begin at multiples of 16 bytes: 8 bf16 elements."""

_LEAST_CAPABILITY = (8, 0)
"""CUDA devices that have the grouped kernel."""


def row_ranges(counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first row, end of rows) of every expert that has rows."""
    end = 0
    for expert, count in enumerate(counts):
        start, end = end, end + count
        if count:
            yield expert, start, end


def check_counts(x: Tensor, counts: Sequence[int], num_experts: int) -> None:
    """Refuse counts that do not describe the rows of x.

    Raises:
        ValueError: wrong number of counts, a negative one, or another sum than the rows of x.
    """
    if len(counts) != num_experts or min(counts, default=0) < 0 or sum(counts) != len(x):
        raise ValueError(
            f"counts {list(counts)} do not spread {len(x)} rows over {num_experts} experts"
        )


def rows_times(
    rows: Tensor, weight: Tensor, counts: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """Return the rows of every expert times its matrix, outside autograd.

    Args:
        rows: (M, I), sorted by expert.
        weight: (E, I, J), any strides.
        counts: rows of each expert.
        out: (M, J) to write to.

    Returns:
        (M, J) in the dtype of `rows`.
    """
    if _fits_grouped_kernel(rows, weight.shape[1], weight.shape[2]):
        product = functional.grouped_mm(rows.contiguous(), weight, offs=_ends(counts, rows.device))
        return product if out is None else out.copy_(product)
    result = rows.new_empty(len(rows), weight.shape[2]) if out is None else out
    for expert, start, end in row_ranges(counts):
        torch.mm(rows[start:end], weight[expert], out=result[start:end])
    return result


def weight_gradients(gradient: Tensor, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the gradients of the matrices of `rows_times`, outside autograd.

    Args:
        gradient: (M, J), gradient of the result.
        rows: (M, I), sorted by expert.
        counts: rows of each expert.

    Returns:
        (E, I, J) in the dtype of `rows`; zeros for experts without rows.
    """
    shape = (len(counts), rows.shape[1], gradient.shape[1])
    if _fits_grouped_kernel(rows, *shape[1:]):
        ends = _ends(counts, rows.device)
        result = functional.grouped_mm(rows.contiguous().t(), gradient.contiguous(), offs=ends)
        empty = [expert for expert, count in enumerate(counts) if not count]
        if not empty:
            return result
        # The kernel may leave the result of an empty group as it was allocated.
        return result.index_fill_(0, torch.tensor(empty, device=rows.device), 0)
    # Every expert with rows is written as a whole.
    result = rows.new_empty(shape) if all(counts) else rows.new_zeros(shape)
    for expert, start, end in row_ranges(counts):
        torch.mm(rows[start:end].t(), gradient[start:end], out=result[expert])
    return result


def rows_gradients(
    gradient: Tensor,
    rows: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    wants: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of both operands of `rows_times`, outside autograd.

    On the CPU both products of an expert follow one another, so that its part of `gradient` is
    read from memory once.

    Args:
        gradient: (M, J), gradient of the result.
        rows: (M, I), sorted by expert.
        weight: (E, I, J).
        counts: rows of each expert.
        wants: whether the gradients of the rows and of the weights are wanted.

    Returns:
        The gradients of the rows (M, I) and of the weights (E, I, J) in the dtype of `rows`, each
        None where it is not wanted.
    """
    if rows.is_cuda or not all(wants):
        d_rows = rows_times(gradient, weight.mT, counts) if wants[0] else None
        return d_rows, weight_gradients(gradient, rows, counts) if wants[1] else None
    d_rows = rows.new_empty(rows.shape)
    d_weight = rows.new_empty(weight.shape) if all(counts) else rows.new_zeros(weight.shape)
    for expert, start, end in row_ranges(counts):
        part = gradient[start:end]
        torch.mm(rows[start:end].t(), part, out=d_weight[expert])
        torch.mm(part, weight[expert].t(), out=d_rows[start:end])
    return d_rows, d_weight


def add_to_rows(y: Tensor, bias: Tensor, counts: Sequence[int]) -> None:
    """Add to the rows (M, J) of every expert, in place, its own row of `bias` (E, J)."""
    for expert, start, end in row_ranges(counts):
        y[start:end] += bias[expert].to(y.dtype)


def sum_of_rows(gradient: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the sum (E, J) of the rows (M, J) of every expert, summed in fp32 at least.

    Args:
        gradient: (M, J), sorted by expert.
        counts: rows of each expert.
        dtype: dtype of the result.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    sums = torch.zeros(len(counts), gradient.shape[1], dtype=wide, device=gradient.device)
    for expert, start, end in row_ranges(counts):
        torch.sum(gradient[start:end], 0, dtype=wide, out=sums[expert])
    return sums.to(dtype)


def _fits_grouped_kernel(rows: Tensor, i: int, j: int) -> bool:
    """Return whether torch's grouped kernel takes products of rows with (i, j) matrices."""
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or not len(rows):
        return False
    if torch.cuda.get_device_capability(rows.device) < _LEAST_CAPABILITY:
        return False
    return i % _ALIGNMENT == 0 and j % _ALIGNMENT == 0


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


class GroupedMatmul(torch.autograd.Function):
    """y = x W_e + b_e for rows sorted by expert; keeps x and the weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: tuple[int, ...]
    ) -> Tensor:
        """Return y (M, J)."""
        ctx.counts, ctx.bias_dtype = counts, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        y = rows_times(x, weight.to(x.dtype), counts)
        if bias is not None:
            add_to_rows(y, bias, counts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the weights and the biases."""
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dx, dw = rows_gradients(
            gradient, x, weight.to(x.dtype), ctx.counts, (wants_x, wants_weight)
        )
        dw = None if dw is None else dw.to(weight.dtype)
        db = sum_of_rows(gradient, ctx.counts, ctx.bias_dtype) if wants_bias else None
        return dx, dw, db, None


_grouped_matmul: Callable[..., Tensor] = GroupedMatmul.apply


def grouped_matmul(
    x: Tensor, weight: Tensor, counts: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """Return ``y = x @ W_e + b_e`` for the rows of every expert e, differentiably.

    Args:
        x: (M, I), rows sorted by expert.
        weight: (E, I, J); used in the dtype of x.
        counts: rows of each expert; their sum is M, zeros are allowed.
        bias: (E, J), or None.

    Returns:
        y (M, J) in the dtype of x. Experts without rows get gradients of zero.

    Raises:
        ValueError: shapes and counts do not belong together.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"cannot multiply x {tuple(x.shape)} with weight {tuple(weight.shape)}")
    check_counts(x, counts, len(weight))
    check_bias(bias, len(weight), weight.shape[2])
    return _grouped_matmul(x, weight, bias, tuple(counts))


def check_bias(bias: Tensor | None, num_experts: int, out_features: int) -> None:
    """Refuse a bias that is not (num_experts, out_features).

    Raises:
        ValueError: it is not.
    """
    if bias is not None and bias.shape != (num_experts, out_features):
        raise ValueError(
            f"the bias is {tuple(bias.shape)}, but must be {(num_experts, out_features)}"
        )
