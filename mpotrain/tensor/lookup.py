"""Lookup of rows in a table that is held as a matrix product operator.

Row i of W is the product of one slice of every core, chosen by the digits (i_1..i_n) of i. For
many ids it is cheaper to rebuild the table once; for few ids the slices are multiplied row by row.
Either way backward needs the ids and the cores alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mpotrain.tensor.cost import copy, gemm, merge_operations, project_operations
from mpotrain.tensor.device import BYTES, PROFILES, DeviceProfile
from mpotrain.tensor.merge import merge_dtype
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.tree import merge_order


def check_ids(ids: Tensor, spec: MPOSpec) -> None:
    """Refuse ids outside the table; on an accelerator the check is left to its kernels.

    Raises:
        IndexError: an id is negative or not below `spec.in_features`.
    """
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= spec.in_features:
        raise IndexError(
            f"ids reach from {low} to {high}, but the table has the rows 0 to "
            f"{spec.in_features - 1}"
        )


@lru_cache(maxsize=4096)
def row_by_row_is_cheaper(spec: MPOSpec, num_ids: int, device_type: str) -> bool:
    """Return whether multiplying slices for each id beats rebuilding the table.

    The decision follows from constants (the profile of the kind of device), never from timings.
    """
    profile = PROFILES["cpu" if device_type == "cpu" else "h200"]
    return _rows_seconds(spec, num_ids, profile) < _table_seconds(spec, num_ids, profile)


def _table_seconds(spec: MPOSpec, num_ids: int, profile: DeviceProfile) -> float:
    """Return the time of rebuilding a table, reading rows, and of the gradient."""
    merges = merge_order(spec, 0, spec.num_cores - 1)
    padded = spec.padded_in * spec.padded_out
    operations = [
        *merge_operations("forward", spec, merges, profile),
        copy("forward", "reorder W", padded, "fp32", "fp32", profile),
        copy("forward", "read rows", num_ids * spec.out_features, "fp32", "fp32", profile),
        copy("backward", "add rows", num_ids * spec.out_features, "fp32", "fp32", profile),
        copy("backward", "reorder dW", padded, "fp32", "fp32", profile),
        *merge_operations("backward", spec, merges[:-1], profile),
        *project_operations(spec, merges, profile),
    ]
    return sum(operation.seconds for operation in operations)


def _rows_seconds(spec: MPOSpec, num_ids: int, profile: DeviceProfile) -> float:
    """Return the time of multiplying one slice of every core for each id, and of its gradient.

    A core costs three selections of slices, four batched products (forward, its recomputation, two
    gradients) at a quarter of the peak, and one product that sums the gradients of its slices.
    """
    seconds, columns = 0.0, 1
    for left, i, j, right in spec.core_shapes:
        size = num_ids * left * j * right
        states = num_ids * columns * (left + j * right)
        flops = 2 * columns * size
        moved = profile.move_seconds(BYTES["fp32"] * (size + states))
        product = max(flops / (profile.fp32_flops / 4), moved) + profile.launch_seconds
        chosen = copy("forward", "slices", size, "fp32", "fp32", profile).seconds
        summed = gemm(
            "backward", "sum", i, left * j * right, num_ids, dtype="fp32", profile=profile
        ).seconds
        seconds += 3 * chosen + 4 * product + summed
        columns *= j
    return seconds


class LookupRows(torch.autograd.Function):
    """Rows of W for some ids, one product of slices for each; keeps the ids and the cores."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, spec: MPOSpec, dtype: torch.dtype, *cores: Tensor) -> Tensor:
        """Return (num_ids, out_features) in `dtype`, computed in fp32 at least."""
        ctx.spec = spec
        ctx.save_for_backward(ids, *cores)
        *_, rows = _partial_rows(ids, cores, spec)
        return rows.view(-1, spec.padded_out)[:, : spec.out_features].to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the cores."""
        spec: MPOSpec = ctx.spec
        ids, *cores = ctx.saved_tensors
        merged = merge_dtype(cores)
        states = _partial_rows(ids, cores, spec)[:-1]
        missing = spec.padded_out - spec.out_features
        state_gradient = functional.pad(gradient.to(merged), (0, missing))
        gradients: list[Tensor | None] = [None] * spec.num_cores
        for k, digits in reversed(list(enumerate(_digits(ids, spec)))):
            core = cores[k].to(merged)
            left, i, j, right = core.shape
            state_gradient = state_gradient.reshape(len(ids), states[k].shape[1], j * right)
            if ctx.needs_input_grad[3 + k]:
                slices = torch.bmm(states[k].transpose(1, 2), state_gradient)
                # A product with one-hot digits sums slices of equal digits in a fixed order.
                one_hot = functional.one_hot(digits, i).to(merged)
                summed = torch.mm(one_hot.t(), slices.reshape(len(ids), left * j * right))
                full = summed.view(i, left, j, right).transpose(0, 1)
                gradients[k] = full.to(cores[k].dtype)
            chosen = core[:, digits].movedim(1, 0).reshape(len(ids), left, j * right)
            state_gradient = torch.bmm(state_gradient, chosen.transpose(1, 2))
        return (None, None, None, *gradients)


lookup_rows: Callable[..., Tensor] = LookupRows.apply
"""Typed entry of `LookupRows`: (ids, spec, dtype, *cores)."""


def _digits(ids: Tensor, spec: MPOSpec) -> list[Tensor]:
    """Return the in-mode indices (i_1..i_n) of the ids, in C order."""
    strides = [math.prod(spec.in_modes[k + 1 :]) for k in range(spec.num_cores)]
    first = torch.div(ids, strides[0], rounding_mode="floor")
    rest = zip(strides[1:], spec.in_modes[1:], strict=True)
    return [first, *(torch.div(ids, s, rounding_mode="floor") % mode for s, mode in rest)]


def _partial_rows(ids: Tensor, cores: Sequence[Tensor], spec: MPOSpec) -> list[Tensor]:
    """Return the products of the first k slices, (num_ids, j_1..j_k, d_k), for k = 0..n."""
    dtype = merge_dtype(cores)
    states = [torch.ones(len(ids), 1, 1, dtype=dtype, device=ids.device)]
    for core, digits in zip(cores, _digits(ids, spec), strict=True):
        left, _, j, right = core.shape
        chosen = core.to(dtype)[:, digits].movedim(1, 0).reshape(len(ids), left, j * right)
        rows = torch.bmm(states[-1], chosen)
        states.append(rows.view(len(ids), rows.shape[1] * j, right))
    return states
