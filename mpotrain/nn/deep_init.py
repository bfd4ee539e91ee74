"""Start values of operators in deep networks: depth scaling, and draws around a shared core.

Liu et al. 2023 (MPOBERT, section 3.3 and appendix A.2) bound the change of a post-norm network of
depth N with W_l = u_l c v_l after a step; it stays O(1) where ``(u_i^2 + v_i^2) u_N v_N = O(1/N)``
(corollary A.2), whose symmetric solution is ``u = v = (2N)^(-1/4)``. With several auxiliary tensors
on a side, u (v) is the product of those left (right) of the central tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.tensor.init import init_cores
from mpotrain.tensor.spec import MPOSpec

AuxiliaryScale = Literal["none", "per_side", "per_tensor"]


def auxiliary_factors(spec: MPOSpec, scale: AuxiliaryScale, depth: int) -> tuple[float, ...]:
    """Return the factor of every auxiliary tensor of an operator in a network of a depth.

    * "per_side": the product of the factors left of the central tensor is (2L)^(-1/4), and so is
      that of those right of it; a side without auxiliary tensors has none. W becomes (2L)^(-1/2)
      times smaller where both sides have some, as corollary A.2 asks;
    * "per_tensor": each is (2L)^(-1/4), as algorithm 2 is written; W becomes (2L)^(-1) times
      smaller with two on each side.

    Args:
        spec: the operator.
        scale: which of them; "none" means ones.
        depth: number of layers L.

    Returns:
        One factor for each core but the central one, in the order of the cores.
    """
    left, right = spec.central_index, spec.num_cores - 1 - spec.central_index
    if scale == "none":
        return (1.0,) * (left + right)
    factor = float(2 * depth) ** -0.25
    if scale == "per_tensor":
        return (factor,) * (left + right)
    sides = (count for count in (left, right) for _ in range(count))
    return tuple(factor ** (1.0 / count) for count in sides)


def draw_operator(
    spec: MPOSpec, site: MPOSite | TTMSite, std: float, generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Draw a whole operator, as a tensorized layer does.

    Central and auxiliary tensors of different draws fit one another: where the initialiser makes
    cores orthogonal ("gaussian_qr"), each of them is an isometry whatever the others are, and the
    last core alone carries the spread of W; otherwise all cores are independent anyway.

    Args:
        spec: its shapes.
        site: names the initialiser.
        std: standard deviation of the elements of W (not read by "xavier", see `scale_operator`).
        generator: source of randomness.

    Returns:
        The central tensor and the auxiliary tensors, in fp32.
    """
    wanted = None if site.init == "xavier" else std
    cores = init_cores(spec, wanted, scheme=site.init, generator=generator)
    return split_cores(cores, spec)


@torch.no_grad()
def scale_operator(cores: Sequence[Tensor], factor: float) -> None:
    """Multiply an operator by a factor, in place and all its cores alike.

    Where cores of several draws make one operator each draw has to be scaled, and the product has
    the factor once. "xavier" fixes the deviation of W itself; this is how it starts with a gain.

    Args:
        cores: all cores of one draw.
        factor: positive; on W.
    """
    for core in cores:
        core.mul_(factor ** (1.0 / len(cores)))


def split_cores(cores: Sequence[Tensor], spec: MPOSpec) -> tuple[Tensor, list[Tensor]]:
    """Return the central tensor and the auxiliary tensors of a list of cores."""
    k = spec.central_index
    return cores[k], [*cores[:k], *cores[k + 1 :]]


def join_cores(central: Tensor, auxiliaries: Sequence[Tensor], spec: MPOSpec) -> list[Tensor]:
    """Return all cores in their order; the inverse of `split_cores`."""
    k = spec.central_index
    return [*auxiliaries[:k], central, *auxiliaries[k:]]
