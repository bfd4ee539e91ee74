"""Singular values on the bonds of a matrix product operator, and what is read from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def bond_spectra(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the singular values of every unfolding of W without building W.

    A sweep of QR decompositions from the right makes the cores right-orthogonal; then a sweep of
    SVDs from the left meets, at every bond, a matrix whose singular values are those of the
    unfolding. The padding of a padded spec belongs to W here.

    Args:
        cores: (d_{k-1}, i_k, j_k, d_k) each.

    Returns:
        Descending singular values for each inner bond, float64 on the CPU. A bond that is larger
        than its neighbours can fill has as many values as they can.
    """
    right = torch.ones(1, 1, dtype=torch.float64)
    orthogonal: list[Tensor] = []
    for core in reversed(cores):
        tensor = core.detach().to("cpu", torch.float64)
        left_bond, i, j, _ = tensor.shape
        matrix = (tensor.reshape(-1, tensor.shape[3]) @ right).reshape(left_bond, -1)
        q, r = torch.linalg.qr(matrix.t())
        orthogonal.append(q.t().reshape(-1, i * j, right.shape[1]))
        right = r.t()
    spectra = []
    left = right
    for tensor in reversed(orthogonal[1:]):
        _, modes, bond = tensor.shape
        matrix = (left @ tensor.reshape(tensor.shape[0], -1)).reshape(-1, bond)
        _, values, rest = torch.linalg.svd(
            matrix.reshape(left.shape[0] * modes, bond), full_matrices=False
        )
        spectra.append(values)
        left = values[:, None] * rest
    return spectra


def entanglement_entropy(
    singular_values: Tensor, kind: Literal["probability", "amplitude"] = "probability"
) -> float:
    """Return ``- sum_j v_j ln v_j`` of a bond, nats.

    Args:
        singular_values: of one unfolding.
        kind: "probability" takes ``v_j = s_j^2 / sum s^2`` (the physical definition);
            "amplitude" takes ``v_j = s_j / sqrt(sum s^2)``, as the released MPOP code does.

    Returns:
        The entropy; 0 for a zero matrix.
    """
    values = singular_values.detach().to("cpu", torch.float64)
    norm = float(values.norm())
    if norm == 0.0:
        return 0.0
    weights = values / norm
    if kind == "probability":
        weights = weights.square()
    return float(-torch.special.xlogy(weights, weights).sum())


def normalised_entropies(spectra: Sequence[Tensor]) -> list[float]:
    """Return the entropy of every bond over its largest possible value, ln d.

    Args:
        spectra: singular values of every bond.

    Returns:
        Numbers from 0 (a product, or a bond of 1) to 1 (all singular values equal).
    """
    return [
        entanglement_entropy(values) / math.log(len(values)) if len(values) > 1 else 0.0
        for values in spectra
    ]


def core_norms(cores: Sequence[Tensor]) -> list[float]:
    """Return the Frobenius norm of every core; very unequal norms make training uneven."""
    return [float(core.detach().to(torch.float64).norm()) for core in cores]
