"""Products of neighbouring cores, their gradients, and the step from products to matrices.

All functions are plain tensor arithmetic outside autograd; `mpotrain.tensor.tree` says in which
order cores are merged. A range of cores is held as (d_left, interleaved modes, d_right), where the
modes i_1 j_1 i_2 j_2 ... stand in the order of the cores.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

import torch
from torch import Tensor

from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.tree import Merge, Range


def merge_dtype(cores: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which cores are merged: fp32 at least.

    On CUDA the products run in TF32 where torch is set to allow it, as 16-bit runs do.

    Merging in bf16 would double the error of y and of all gradients; merging in fp32 and rounding
    W once keeps that of a dense bf16 layer.
    """
    dtype = torch.float32
    for core in cores:
        dtype = torch.promote_types(dtype, core.dtype)
    return dtype


def leaves(
    cores: Sequence[Tensor], first: int, last: int, dtype: torch.dtype
) -> dict[Range, Tensor]:
    """Return the cores first..last as (d_left, i*j, d_right) in `dtype`, by range."""
    return {
        (k, k): cores[k].to(dtype).reshape(cores[k].shape[0], -1, cores[k].shape[3])
        for k in range(first, last + 1)
    }


def merge(left: Tensor, right: Tensor) -> Tensor:
    """Contract (a, p, b) with (b, q, c) to (a, p*q, c) by one matrix product."""
    a, p, b = left.shape
    _, q, c = right.shape
    return torch.mm(left.reshape(a * p, b), right.reshape(b, q * c)).view(a, p * q, c)


def merge_all(parts: dict[Range, Tensor], merges: Sequence[Merge]) -> Tensor:
    """Merge the cores in `parts` and free every factor as soon as it is used.

    Args:
        parts: the single cores by range; emptied.
        merges: what to merge, as `merge_order` gives it.

    Returns:
        The product of all of them, (d_left, modes, d_right).
    """
    for step in merges:
        parts[step.result] = merge(parts.pop(step.left), parts.pop(step.right))
    _, product = parts.popitem()
    return product


def merge_factors(parts: dict[Range, Tensor], merges: Sequence[Merge]) -> None:
    """Add to `parts` every factor of every merge, but not the last product itself."""
    for step in merges[:-1]:
        parts[step.result] = merge(parts[step.left], parts[step.right])


def merge_gradients(
    gradient: Tensor,
    parts: dict[Range, Tensor],
    merges: Sequence[Merge],
    wanted: Collection[int],
) -> dict[int, Tensor]:
    """Return the gradients of the cores from the gradient of their product.

    Partial products are shared between the cores (Chekalina et al. 2023, arXiv 2306.02697, the
    "full matrix" backward): each merge costs two matrix products, whatever the number of cores.
    Branches without wanted cores are skipped.

    Args:
        gradient: gradient of the product, (d_left, modes, d_right).
        parts: all factors, from `merge_factors`; left as they are.
        merges: the order of merging.
        wanted: cores whose gradient is wanted.

    Returns:
        Gradient (d_left, i*j, d_right) for each wanted core.
    """

    def needed(cores: Range) -> bool:
        return any(cores[0] <= k <= cores[1] for k in wanted)

    gradients: dict[Range, Tensor] = {}
    last = merges[-1].result if merges else next(iter(parts))
    if needed(last):
        gradients[last] = gradient
    for step in reversed(merges):
        whole = gradients.pop(step.result, None)
        if whole is None:
            continue
        left, right = parts[step.left], parts[step.right]
        (a, p, b), (_, q, c) = left.shape, right.shape
        whole = whole.reshape(a * p, q * c)
        if needed(step.left):
            gradients[step.left] = torch.mm(whole, right.reshape(b, q * c).t()).view(a, p, b)
        if needed(step.right):
            gradients[step.right] = torch.mm(left.reshape(a * p, b).t(), whole).view(b, q, c)
    return {first: value for (first, _), value in gradients.items()}


def split_modes(product: Tensor, spec: MPOSpec, cores: Range) -> Tensor:
    """View (d_left, modes, d_right) as (d_left, i_a..i_b, j_a..j_b, d_right)."""
    first, last = cores
    count = last - first + 1
    pairs = zip(spec.in_modes[first : last + 1], spec.out_modes[first : last + 1], strict=True)
    left, _, right = product.shape
    apart = product.view(left, *chain.from_iterable(pairs), right)
    order = [0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2), 2 * count + 1]
    return apart.permute(order)


def product_to_matrix(product: Tensor, spec: MPOSpec, dtype: torch.dtype) -> Tensor:
    """Reorder the product of all cores to W and cast it, in one pass over the memory.

    Args:
        product: (1, modes, 1).
        spec: the cores.
        dtype: dtype of the result.

    Returns:
        W (in_features, out_features); a view where there is padding.
    """
    source = split_modes(product, spec, (0, spec.num_cores - 1))
    matrix = torch.empty(spec.padded_in, spec.padded_out, dtype=dtype, device=product.device)
    matrix.view(source.shape).copy_(source)
    return matrix[: spec.in_features, : spec.out_features]


def matrix_to_product(matrix: Tensor, spec: MPOSpec, dtype: torch.dtype) -> Tensor:
    """Reverse `product_to_matrix`; padded rows and columns become zeros.

    Args:
        matrix: (in_features, out_features).
        spec: the cores.
        dtype: dtype of the result.

    Returns:
        (1, modes, 1), contiguous.
    """
    if spec.is_padded:
        padded = matrix.new_zeros(spec.padded_in, spec.padded_out)
        padded[: spec.in_features, : spec.out_features] = matrix
        matrix = padded
    product = torch.empty(1, matrix.numel(), 1, dtype=dtype, device=matrix.device)
    target = split_modes(product, spec, (0, spec.num_cores - 1))
    target.copy_(matrix.reshape(target.shape))
    return product
