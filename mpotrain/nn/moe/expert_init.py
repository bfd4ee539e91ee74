"""Start values of experts that share a central tensor.

W_e = L_e C R_e. With independent cores the mean square of the elements of W_e is a product of the
spreads of its cores, which both schemes solve for the wanted standard deviation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpotrain.nn.moe.config import ExpertInit, ExpertStart
from mpotrain.tensor.experts import auxiliary_shapes
from mpotrain.tensor.spec import MPOSpec


def init_experts(
    spec: MPOSpec,
    num_experts: int,
    std: float,
    *,
    scheme: ExpertInit = "orthogonal",
    start: ExpertStart = "copies",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Draw the central tensor, then auxiliaries: once for all experts, or for one after another.

    Schemes:

    * "orthogonal": auxiliaries left of the central tensor have orthonormal columns as matrices
      (d i j, d'), those right of it orthonormal rows as (d, i j d'), all uniformly distributed;
      where a matrix is too narrow for that, the other side is orthonormal and scaled so that the
      mean of A^T A (A A^T) is the identity. The central tensor is Gaussian and carries the scale;
    * "balanced": the elements of all cores have one and the same spread.

    Args:
        spec: operator of one expert.
        num_experts: E.
        std: standard deviation of the elements of every W_e.
        scheme: see above.
        start: "copies": all experts start alike, as upcycled ones do (Gao et al. 2022);
            "independent": each has a draw of its own.
        generator: source of randomness (CPU).

    Returns:
        The central tensor (d, i, j, d') and for each auxiliary place k a tensor (E, d, i, j, d'),
        in fp32. Experts below E do not depend on E.
    """
    central_shape = spec.core_shapes[spec.central_index]
    shapes = auxiliary_shapes(spec)
    balanced = (std**2 / math.prod(spec.bonds)) ** (0.5 / spec.num_cores)
    if scheme == "balanced":
        spread = balanced
    else:
        spread = std * math.sqrt(spec.padded_in * spec.padded_out / math.prod(central_shape))
    central = spread * torch.randn(central_shape, generator=generator)
    auxiliaries = [torch.empty(num_experts, *shape) for shape in shapes]
    draws = 1 if start == "copies" else num_experts
    for expert in range(draws):
        for k, shape in enumerate(shapes):
            noise = torch.randn(shape, generator=generator)
            auxiliaries[k][expert] = (
                balanced * noise
                if scheme == "balanced"
                else _isometry(noise, is_left=k < spec.central_index)
            )
    for auxiliary in auxiliaries:
        auxiliary[draws:] = auxiliary[:1]
    return central, auxiliaries


def _isometry(noise: Tensor, *, is_left: bool) -> Tensor:
    """Return a random auxiliary of the orthogonal scheme from Gaussian noise (d, i, j, d')."""
    left, i, j, right = noise.shape
    matrix = noise.double()
    # As a matrix with the bond towards the central tensor in the columns.
    matrix = matrix.reshape(-1, right) if is_left else matrix.reshape(left, -1).t()
    rows, columns = matrix.shape
    if rows >= columns:
        matrix = _orthonormal_columns(matrix)
    else:
        matrix = math.sqrt(columns / rows) * _orthonormal_columns(matrix.t()).t()
    return (matrix if is_left else matrix.t()).reshape(left, i, j, right).float()


def _orthonormal_columns(matrix: Tensor) -> Tensor:
    basis: Tensor
    basis, triangle = torch.linalg.qr(matrix)
    # With a positive diagonal the factor is unique, and uniformly distributed for Gaussian noise.
    return basis * torch.where(torch.diagonal(triangle) < 0, -1.0, 1.0).to(basis.dtype)
