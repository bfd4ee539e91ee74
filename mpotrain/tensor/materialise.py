"""The plan "materialise": rebuild W, do one matrix product, keep nothing for backward.

Backward needs the input and the cores alone. It forms dW once, projects it on the cores, and only
then rebuilds W for dx, so that never more than one full-size matrix beside its fp32 copy is alive
and the peak stays near that of ``torch.nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpotrain.tensor.merge import (
    leaves,
    matrix_to_product,
    merge,
    merge_all,
    merge_dtype,
    merge_factors,
    merge_gradients,
    product_to_matrix,
)
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.tree import Range, merge_order


def weight_from_cores(cores: Sequence[Tensor], spec: MPOSpec, dtype: torch.dtype) -> Tensor:
    """Rebuild W outside autograd: merged in fp32, cast once.

    Args:
        cores: (d_{k-1}, i_k, j_k, d_k) each.
        spec: their shapes.
        dtype: dtype of the result.

    Returns:
        W (in_features, out_features).
    """
    n = spec.num_cores
    parts = leaves(cores, 0, n - 1, merge_dtype(cores))
    product = merge_all(parts, merge_order(spec, 0, n - 1))
    return product_to_matrix(product, spec, dtype)


def project_weight_gradient(
    weight_gradient: Tensor,
    cores: Sequence[Tensor],
    spec: MPOSpec,
    wanted: Collection[int],
) -> list[Tensor | None]:
    """Return the gradients of the cores that belong to a gradient of W.

    The projection is linear in dW: gradients of W may be summed over micro-batches and be
    projected once.

    Args:
        weight_gradient: dW (in_features, out_features).
        cores: the cores.
        spec: their shapes.
        wanted: cores whose gradient is wanted.

    Returns:
        One gradient for each core, in its shape and dtype; None where it is not wanted.
    """
    parts: dict[Range, Tensor] = {}
    return _project(weight_gradient, cores, spec, wanted, parts)


def _project(
    weight_gradient: Tensor,
    cores: Sequence[Tensor],
    spec: MPOSpec,
    wanted: Collection[int],
    parts: dict[Range, Tensor],
) -> list[Tensor | None]:
    """Project as above and leave the factors of W in `parts`."""
    dtype = merge_dtype(cores)
    merges = merge_order(spec, 0, spec.num_cores - 1)
    product = matrix_to_product(weight_gradient, spec, dtype)
    del weight_gradient
    parts.update(leaves(cores, 0, spec.num_cores - 1, dtype))
    merge_factors(parts, merges)
    found = merge_gradients(product, parts, merges, wanted)
    return [
        found[k].reshape(core.shape).to(core.dtype) if k in found else None
        for k, core in enumerate(cores)
    ]


class MaterialiseLinear(torch.autograd.Function):
    """y = x W + b through a rebuilt W; keeps x and the cores (and W where the plan says so)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, spec: MPOSpec, keep: bool, *cores: Tensor
    ) -> Tensor:
        """Return y (..., out_features) for x (..., in_features)."""
        weight = weight_from_cores(cores, spec, x.dtype)
        rows = x.reshape(-1, spec.in_features)
        ctx.spec, ctx.keep, ctx.bias_dtype = spec, keep, None if bias is None else bias.dtype
        ctx.save_for_backward(x, *cores, *((weight,) if keep else ()))
        y = torch.mm(rows, weight) if bias is None else torch.addmm(bias.to(x.dtype), rows, weight)
        return y.view(*x.shape[:-1], spec.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the bias and the cores; see the module for the order."""
        spec: MPOSpec = ctx.spec
        x, *rest = ctx.saved_tensors
        cores = rest[: spec.num_cores]
        dy = gradient.reshape(-1, spec.out_features)
        wanted = [k for k in range(spec.num_cores) if ctx.needs_input_grad[4 + k]]
        core_gradients: list[Tensor | None] = [None] * spec.num_cores
        parts: dict[Range, Tensor] = {}
        if wanted:
            core_gradients = _project(
                torch.mm(x.reshape(-1, spec.in_features).t(), dy),
                cores,
                spec,
                wanted,
                parts,
            )
        dx = None
        if ctx.needs_input_grad[0]:
            weight = rest[-1] if ctx.keep else _rebuild(parts, cores, spec, x.dtype)
            dx = torch.mm(dy, weight.t()).view(x.shape)
        db = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return (dx, db, None, None, *core_gradients)


def _rebuild(
    parts: dict[Range, Tensor], cores: Sequence[Tensor], spec: MPOSpec, dtype: torch.dtype
) -> Tensor:
    """Return W from the factors of its last merge where the projection has left them."""
    merges = merge_order(spec, 0, spec.num_cores - 1)
    if not parts:
        return weight_from_cores(cores, spec, dtype)
    left, right = parts[merges[-1].left], parts[merges[-1].right]
    parts.clear()
    return product_to_matrix(merge(left, right), spec, dtype)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of dy (tokens, out_features) over the tokens, summed in fp32 at least."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dtype)


class Materialise(torch.autograd.Function):
    """W from its cores; keeps the cores alone."""

    @staticmethod
    def forward(ctx: Any, spec: MPOSpec, dtype: torch.dtype, *cores: Tensor) -> Tensor:
        """Return W (in_features, out_features)."""
        ctx.spec = spec
        ctx.save_for_backward(*cores)
        return weight_from_cores(cores, spec, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the cores."""
        wanted = [k for k in range(ctx.spec.num_cores) if ctx.needs_input_grad[2 + k]]
        cores = ctx.saved_tensors
        return (
            None,
            None,
            *project_weight_gradient(gradient, cores, ctx.spec, wanted),
        )


materialise_linear: Callable[..., Tensor] = MaterialiseLinear.apply
"""Typed entry of `MaterialiseLinear`: (x, bias, spec, keep, *cores)."""

materialise_weight: Callable[..., Tensor] = Materialise.apply
"""Typed entry of `Materialise`: (spec, dtype, *cores)."""
