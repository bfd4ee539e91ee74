"""From a matrix to cores: exact or truncated matrix product operators (Gao et al. 2020).

All arithmetic is float64 on the CPU. W is zero-padded, its modes are interleaved to
(i_1 j_1, i_2 j_2, ...), and every unfolding (modes up to k as rows, the rest as columns) is
decomposed by an SVD. Two gauges are offered:

* canonical (Liu et al. 2021, arXiv 2106.02205, and its released code): the square roots of the
  singular values stand on both sides of every bond, so that the norm of W is spread evenly over
  the cores; truncation keeps the leading slices of every bond;
* left: the sequential sweep; every core but the last is left-orthogonal, the last one carries the
  norm, and the squared truncation error is the exact sum of the discarded squares.

In either gauge the error is at most ``sqrt(sum_k eps_k^2)``, where eps_k^2 is the sum of the
squared singular values of unfolding k that are discarded (eq. 4 and its proof; eq. 3 as printed is
a plain sum, which is a slip).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpotrain.errors import SpecError
from mpotrain.tensor.merge import matrix_to_product
from mpotrain.tensor.spec import Layout, MPOSpec, exact_bonds, layout_modes, mpo_spec
from mpotrain.tensor.spectra import entanglement_entropy

Gauge = Literal["canonical", "left"]


@dataclass(frozen=True)
class Decomposition:
    """A matrix in the form of cores, with what was lost.

    Attributes:
        spec: shapes of the cores.
        cores: (d_{k-1}, i_k, j_k, d_k) each, in the dtype and on the device of the matrix.
        spectra: all singular values of every unfolding of the matrix, float64, descending.
        error_bound: upper bound of the Frobenius norm of W - rebuild(cores).
        relative_error_bound: the same over the norm of W (0 for a zero matrix).
    """

    spec: MPOSpec
    cores: tuple[Tensor, ...]
    spectra: tuple[Tensor, ...]
    error_bound: float
    relative_error_bound: float

    @property
    def entropies(self) -> tuple[float, ...]:
        """Entanglement entropy of every bond of the untruncated matrix, nats."""
        return tuple(entanglement_entropy(values) for values in self.spectra)


def decompose(
    weight: Tensor,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
    *,
    bonds: Sequence[int] | None = None,
    cap: int | None = None,
    max_error: float | None = None,
    max_parameters: int | None = None,
    gauge: Gauge = "canonical",
    layout: Layout = "ttm",
) -> Decomposition:
    """Write a matrix as a matrix product operator.

    Args:
        weight: W (in_features, out_features).
        in_modes: factors of the rows; their product may exceed in_features (zero padding).
        out_modes: factors of the columns, likewise.
        bonds: all inner bonds.
        cap: largest bond.
        max_error: largest relative Frobenius error; bonds shrink where a parameter costs least.
        max_parameters: largest number of parameters; likewise.
        gauge: "canonical" or "left", see the module.
        layout: "ttm" or "tt", see `mpotrain.tensor.spec.layout_modes`.

    Returns:
        The cores and their truncation error. Without `bonds`, `cap`, `max_error` and
        `max_parameters` the decomposition is exact.

    Raises:
        SpecError: W is no finite matrix, more than one limit is given, or a limit cannot be met.
    """
    limits = {"bonds": bonds, "cap": cap, "max_error": max_error, "max_parameters": max_parameters}
    given = [name for name, value in limits.items() if value is not None]
    if len(given) > 1:
        raise SpecError(f"give one of {', '.join(given)}, not {len(given)} of them")
    if gauge not in ("canonical", "left"):
        raise SpecError(f"gauge is {gauge!r}; it must be 'canonical' or 'left'")
    if weight.ndim != 2 or not bool(torch.isfinite(weight).all()):
        raise SpecError(f"weight {tuple(weight.shape)} must be a matrix of finite numbers")
    size = (weight.shape[0], weight.shape[1])
    full = mpo_spec(*size, in_modes, out_modes, layout=layout)
    on_cpu = weight.detach().to("cpu", torch.float64)
    tensor = matrix_to_product(on_cpu, full, torch.float64).reshape(-1)
    bases, spectra = _unfold(tensor, full)
    if max_error is not None or max_parameters is not None:
        bonds = _least_costly_bonds(full, spectra, max_error, max_parameters)
    modes = layout_modes(in_modes, out_modes, layout)
    spec = mpo_spec(*size, *modes, bonds=bonds, cap=cap)
    sweep = _canonical_cores if gauge == "canonical" else _left_cores
    cores = sweep(tensor, spec, bases, spectra)
    lost = sum(float(s[d:].square().sum()) for s, d in zip(spectra, spec.bonds, strict=True))
    norm = float(tensor.norm())
    return Decomposition(
        spec=spec,
        cores=tuple(core.to(weight.device, weight.dtype) for core in cores),
        spectra=spectra,
        error_bound=math.sqrt(lost),
        relative_error_bound=math.sqrt(lost) / norm if norm > 0 else 0.0,
    )


def _unfold(tensor: Tensor, spec: MPOSpec) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return left singular vectors (rows, d_k) and singular values of every unfolding."""
    bases, spectra = [], []
    rows = 1
    for i, j in list(zip(spec.in_modes, spec.out_modes, strict=True))[:-1]:
        rows *= i * j
        left, values, _ = torch.linalg.svd(tensor.view(rows, -1), full_matrices=False)
        bases.append(left)
        spectra.append(values)
    return tuple(bases), tuple(spectra)


def _canonical_cores(
    tensor: Tensor, spec: MPOSpec, bases: Sequence[Tensor], spectra: Sequence[Tensor]
) -> list[Tensor]:
    """Return the leading slices of the symmetric canonical form.

    With U_k and s_k of unfolding k, the first k cores must multiply to ``M_k = U_k s_k^(1/2)``;
    hence ``T_k = s_{k-1}^(-1/2) U_{k-1}^T U_k s_k^(1/2)``, and the last core is
    ``s_{n-1}^(-1/2) U_{n-1}^T W``. Singular values that vanish are clamped before they are
    inverted; the slices they scale have vanishing counterparts, so that W is not affected.
    """
    cores = []
    previous = torch.ones(1, 1, dtype=torch.float64)
    for k, (left, i, j, right) in enumerate(spec.core_shapes):
        if k < len(bases):
            target = bases[k][:, :right] * spectra[k][:right].sqrt()
        else:
            target = tensor.view(-1, 1)
        core = previous.t() @ target.reshape(previous.shape[0], -1)
        cores.append(core.reshape(left, i, j, right))
        if k < len(bases):
            values = spectra[k][:right]
            floor = float(values[0]) * torch.finfo(torch.float64).eps * len(values)
            previous = bases[k][:, :right] / values.clamp_min(floor or 1.0).sqrt()
    return cores


def _left_cores(
    tensor: Tensor, spec: MPOSpec, bases: Sequence[Tensor], spectra: Sequence[Tensor]
) -> list[Tensor]:
    """Return the cores of the sequential sweep, each SVD taken of the running remainder."""
    del bases, spectra
    cores = []
    remainder = tensor
    for left, i, j, right in spec.core_shapes[:-1]:
        vectors, values, rest = torch.linalg.svd(
            remainder.reshape(left * i * j, -1), full_matrices=False
        )
        kept = min(right, len(values))
        core = vectors.new_zeros(left * i * j, right)
        core[:, :kept] = vectors[:, :kept]
        remainder = vectors.new_zeros(right, rest.shape[1])
        remainder[:kept] = values[:kept, None] * rest[:kept]
        cores.append(core.reshape(left, i, j, right))
    cores.append(remainder.reshape(spec.core_shapes[-1]))
    return cores


def _least_costly_bonds(
    spec: MPOSpec,
    spectra: Sequence[Tensor],
    max_error: float | None,
    max_parameters: int | None,
) -> tuple[int, ...]:
    """Shrink exact bonds one by one where a saved parameter adds the least squared error.

    Stops when the next step would exceed `max_error`, or once `max_parameters` is met.
    """
    squares = [values.square().tolist() for values in spectra]
    total = sum(squares[0])
    bonds = list(exact_bonds(spec.in_modes, spec.out_modes))
    modes = [i * j for i, j in zip(spec.in_modes, spec.out_modes, strict=True)]
    saved = _savings(modes)
    if max_error is not None and max_error < 0:
        raise SpecError(f"max_error is {max_error}; it must not be negative")
    budget = math.inf if max_error is None else max_error**2 * total
    parameters, lost = spec.num_parameters, 0.0
    while max_parameters is None or parameters > max_parameters:
        steps = [
            (squares[k][bond - 1] / saved(bonds, k), k)
            for k, bond in enumerate(bonds)
            if bond > 1 and lost + squares[k][bond - 1] <= budget
        ]
        if not steps:
            break
        _, k = min(steps)
        lost += squares[k][bonds[k] - 1]
        parameters -= saved(bonds, k)
        bonds[k] -= 1
    if max_parameters is not None and parameters > max_parameters:
        raise SpecError(
            f"max_parameters is {max_parameters}, but even bonds of 1 need {parameters} "
            f"for in_modes {list(spec.in_modes)} and out_modes {list(spec.out_modes)}"
        )
    return tuple(bonds)


def _savings(modes: Sequence[int]) -> Callable[[Sequence[int], int], int]:
    """Return a function that counts the parameters which shrinking a bond by one saves."""

    def saved(bonds: Sequence[int], k: int) -> int:
        left = bonds[k - 1] if k > 0 else 1
        right = bonds[k + 1] if k + 1 < len(bonds) else 1
        return left * modes[k] + modes[k + 1] * right

    return saved
