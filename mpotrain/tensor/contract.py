"""Contractions with a matrix product operator: rebuild, linear layer, table lookup.

`linear` executes a `mpotrain.tensor.plan.ContractionPlan`. Whatever the plan, it keeps its input
and the cores alone for backward (and W where the plan says so). Cores are merged in fp32, W is cast
once to the dtype of the input, and gradients are projected on the cores in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mpotrain.tensor.chain import chain_linear
from mpotrain.tensor.lookup import check_ids, lookup_rows, row_by_row_is_cheaper
from mpotrain.tensor.materialise import materialise_linear, materialise_weight
from mpotrain.tensor.merge import merge_dtype, split_modes
from mpotrain.tensor.plan import ContractionPlan
from mpotrain.tensor.spec import MPOSpec


def rebuild(cores: Sequence[Tensor], spec: MPOSpec) -> Tensor:
    """Rebuild W, differentiably, by plain tensor operations from left to right.

    This is the reference that everything else is tested against: it keeps every partial product
    for backward. `materialise` computes the same and keeps the cores alone.

    Args:
        cores: (d_{k-1}, i_k, j_k, d_k) each.
        spec: their shapes.

    Returns:
        W (in_features, out_features), in fp32 or the wider dtype of the cores.
    """
    _check_cores(cores, spec)
    dtype = merge_dtype(cores)
    product = torch.ones(1, 1, 1, dtype=dtype, device=cores[0].device)
    for core in cores:
        left, i, j, right = core.shape
        product = torch.matmul(product, core.to(dtype).reshape(left, i * j * right))
        product = product.reshape(1, -1, right)
    split = split_modes(product, spec, (0, spec.num_cores - 1))
    matrix = split.reshape(spec.padded_in, spec.padded_out)
    return matrix[: spec.in_features, : spec.out_features]


def materialise(cores: Sequence[Tensor], spec: MPOSpec, dtype: torch.dtype | None = None) -> Tensor:
    """Rebuild W by the cheapest merges, keeping the cores alone for backward.

    Use it to rebuild W once and to multiply by it several times.

    Args:
        cores: (d_{k-1}, i_k, j_k, d_k) each.
        spec: their shapes.
        dtype: dtype of W; by default that of the cores.

    Returns:
        W (in_features, out_features); a strided view where the spec is padded.
    """
    _check_cores(cores, spec)
    return materialise_weight(spec, dtype or cores[0].dtype, *cores)


def linear(
    x: Tensor,
    cores: Sequence[Tensor],
    spec: MPOSpec,
    plan: ContractionPlan,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``y = x @ W + b`` for the W that the cores stand for.

    Args:
        x: (..., in_features), of any floating dtype and any strides.
        cores: (d_{k-1}, i_k, j_k, d_k) each; their dtype may differ from that of x.
        spec: their shapes.
        plan: how to compute it, made for this spec; it holds for any number of tokens.
        bias: (out_features,), or None.

    Returns:
        y (..., out_features) in the dtype of x.

    Raises:
        ValueError: shapes, spec and plan do not belong together.
    """
    _check_cores(cores, spec)
    if plan.spec != spec:
        raise ValueError(f"the plan was made for {plan.spec}, not for {spec}")
    if x.shape[-1] != spec.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, but W has {spec.in_features} rows")
    if plan.kind == "materialise":
        return materialise_linear(x, bias, spec, plan.keep_weight, *cores)
    return chain_linear(x, bias, plan, *cores)


def embedding(
    ids: Tensor, cores: Sequence[Tensor], spec: MPOSpec, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the rows ``W[ids]`` of the table that the cores stand for.

    Args:
        ids: row numbers, integers of any shape.
        cores: (d_{k-1}, i_k, j_k, d_k) each.
        spec: their shapes; the rows are the in side.
        dtype: dtype of the result; by default that of the cores.

    Returns:
        (*ids.shape, out_features).

    Raises:
        IndexError: an id is outside 0..in_features-1 (checked on the CPU).
    """
    _check_cores(cores, spec)
    check_ids(ids, spec)
    dtype = dtype or cores[0].dtype
    if row_by_row_is_cheaper(spec, ids.numel(), ids.device.type):
        rows = lookup_rows(ids.reshape(-1), spec, dtype, *cores)
        return rows.view(*ids.shape, spec.out_features)
    return functional.embedding(ids, materialise(cores, spec, dtype))


def _check_cores(cores: Sequence[Tensor], spec: MPOSpec) -> None:
    shapes = tuple(tuple(core.shape) for core in cores)
    if shapes != spec.core_shapes:
        raise ValueError(f"the cores have the shapes {shapes}, but the spec {spec.core_shapes}")
