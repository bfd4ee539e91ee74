"""Random cores with a prescribed spread of the elements of W.

The elements of W are sums of products of core elements. For independent cores with variances v_k
the variance of an element of W is ``prod_k v_k * prod_k d_k``, which every scheme solves for the
wanted standard deviation.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mpotrain.errors import SpecError
from mpotrain.tensor.spec import MPOSpec

Scheme = Literal["gaussian_qr", "gaussian", "balanced", "xavier"]


def init_cores(
    spec: MPOSpec,
    std: float | None = None,
    *,
    scheme: Scheme = "gaussian_qr",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Draw cores.

    Schemes:

    * "gaussian": core k ~ N(0, 1/d_{k-1}), the last one times `std`;
    * "gaussian_qr": the same W as "gaussian", but QR decompositions from left to right make every
      core but the last left-orthogonal, so that the last one carries the scale (Chekalina et al.
      2023, arXiv 2306.02697). A core that is wider than tall (d_k > d_{k-1} i_k j_k, redundant
      bonds) becomes row-orthogonal instead, so that no slice of it is dead;
    * "balanced": the elements of all cores have one and the same spread;
    * "xavier": balanced, with ``std = sqrt(2 / (in_features + out_features))`` (`std` is not read).

    Args:
        spec: shapes of the cores.
        std: standard deviation of the elements of the rebuilt W.
        scheme: see above.
        generator: source of randomness; the numbers are drawn on its device (default CPU).
        dtype: dtype of the cores; the arithmetic is float64.
        device: where the cores go.

    Returns:
        The cores (d_{k-1}, i_k, j_k, d_k).

    Raises:
        SpecError: unknown scheme, or a missing or negative std.
    """
    if scheme not in get_args(Scheme):
        raise SpecError(f"scheme is {scheme!r}; use one of {', '.join(get_args(Scheme))}")
    if scheme == "xavier":
        std = math.sqrt(2.0 / (spec.in_features + spec.out_features))
    if std is None or not std >= 0.0:
        raise SpecError(f"std is {std}; scheme {scheme!r} needs a number of at least 0")
    spreads = _spreads(spec, std, scheme)
    source = generator.device if generator is not None else torch.device("cpu")
    cores = []
    for shape, spread in zip(spec.core_shapes, spreads, strict=True):
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=source)
        cores.append(noise.to(torch.float64) * spread)
    if scheme == "gaussian_qr":
        cores = orthogonalise(cores)
    return [core.to(device, dtype).contiguous() for core in cores]


def _spreads(spec: MPOSpec, std: float, scheme: Scheme) -> list[float]:
    """Return the standard deviation of the elements of every core."""
    if scheme in ("gaussian", "gaussian_qr"):
        spreads = [1.0 / math.sqrt(left) for left, _, _, _ in spec.core_shapes]
        spreads[-1] *= std
        return spreads
    variance = std**2 / math.prod(spec.bonds)
    return [variance ** (0.5 / spec.num_cores)] * spec.num_cores


def orthogonalise(cores: list[Tensor]) -> list[Tensor]:
    """Make every core but the last left-orthogonal without changing W or any shape.

    Args:
        cores: (d_{k-1}, i_k, j_k, d_k) each.

    Returns:
        New cores. With ``A_k = T_k.reshape(-1, d_k)``: ``A_k^T A_k = 1`` where A_k is at least as
        tall as wide, else ``A_k A_k^T = 1``.
    """
    result = []
    carried = torch.eye(1, dtype=cores[0].dtype, device=cores[0].device)
    for core in cores[:-1]:
        _, i, j, right = core.shape
        matrix = torch.tensordot(carried, core, dims=1).reshape(-1, right)
        if matrix.shape[0] >= right:
            basis, carried = torch.linalg.qr(matrix)
            signs = torch.where(torch.diagonal(carried) < 0, -1.0, 1.0).to(carried.dtype)
            basis, carried = basis * signs, signs[:, None] * carried
        else:
            u, values, v = torch.linalg.svd(matrix, full_matrices=False)
            basis, carried = u @ v, v.t() @ (values[:, None] * v)
        result.append(basis.reshape(-1, i, j, right))
    result.append(torch.tensordot(carried, cores[-1], dims=1))
    return result
