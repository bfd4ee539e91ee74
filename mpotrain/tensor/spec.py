"""What a matrix product operator is made of: modes, bonds, core shapes (torch-free).

A weight matrix W (in x out, used as ``y = x @ W``) is written as

    W[(i_1..i_n), (j_1..j_n)] = T_1[i_1, j_1] T_2[i_2, j_2] ... T_n[i_n, j_n]

where core k has the shape ``(d_{k-1}, i_k, j_k, d_k)`` with ``d_0 = d_n = 1`` (Gao et al. 2020,
Phys. Rev. Research 2, 023300, eq. 1). Row and column indices count in C order: the first mode is
the slowest. Where the modes multiply to more than the layer needs, the surplus rows and columns
are padding and the layer uses ``W[:in_features, :out_features]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpotrain.errors import SpecError
from mpotrain.tensor.ttm import ttm_shape

Layout = Literal["ttm", "tt"]
"""`ttm`: core k carries in mode k and out mode k; `tt`: all out modes, then all in modes."""


@dataclass(frozen=True)
class MPOSpec:
    """The shape of one matrix product operator.

    Attributes:
        in_modes: factors of the (padded) number of rows, i_1..i_n.
        out_modes: factors of the (padded) number of columns, j_1..j_n.
        bonds: inner bond dimensions d_1..d_{n-1}.
        in_features: rows that are used; 0 stands for the product of `in_modes`.
        out_features: columns that are used; 0 stands for the product of `out_modes`.
        allow_redundant_bonds: accept bonds above the exact rank, as published TTM models have.

    Raises:
        SpecError: modes, bonds and sizes do not fit together; the text names every problem.
    """

    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    bonds: tuple[int, ...]
    in_features: int = 0
    out_features: int = 0
    allow_redundant_bonds: bool = False

    def __post_init__(self) -> None:
        for name in ("in_modes", "out_modes", "bonds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _require(_mode_problems(self.in_modes, self.out_modes))
        if self.in_features == 0:
            object.__setattr__(self, "in_features", self.padded_in)
        if self.out_features == 0:
            object.__setattr__(self, "out_features", self.padded_out)
        _require(
            _size_problems("in", self.in_modes, self.in_features)
            + _size_problems("out", self.out_modes, self.out_features)
            + self._bond_problems()
        )

    def _bond_problems(self) -> list[str]:
        if len(self.bonds) != self.num_cores - 1:
            return [
                f"{self.num_cores} cores have {self.num_cores - 1} inner bonds, "
                f"but bonds = {list(self.bonds)} has {len(self.bonds)}"
            ]
        problems = []
        exact = exact_bonds(self.in_modes, self.out_modes)
        for k, (bond, most) in enumerate(zip(self.bonds, exact, strict=True), start=1):
            if not _is_count(bond):
                problems.append(f"bond {k} is {bond!r}; it must be a whole number of at least 1")
            elif bond > most and not self.allow_redundant_bonds:
                problems.append(
                    f"bond {k} is {bond} but at most {most} is possible between cores {k} and "
                    f"{k + 1}; lower it"
                )
        return problems

    @property
    def num_cores(self) -> int:
        """Number of cores, n."""
        return len(self.in_modes)

    @property
    def all_bonds(self) -> tuple[int, ...]:
        """All n + 1 bond dimensions, the outer ones (1) included."""
        return (1, *self.bonds, 1)

    @property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shape (d_{k-1}, i_k, j_k, d_k) of every core."""
        d = self.all_bonds
        modes = zip(self.in_modes, self.out_modes, strict=True)
        return tuple((d[k], i, j, d[k + 1]) for k, (i, j) in enumerate(modes))

    @property
    def padded_in(self) -> int:
        """Product of the in modes: rows of the rebuilt matrix, padding included."""
        return math.prod(self.in_modes)

    @property
    def padded_out(self) -> int:
        """Product of the out modes: columns of the rebuilt matrix, padding included."""
        return math.prod(self.out_modes)

    @property
    def is_padded(self) -> bool:
        """Whether the rebuilt matrix has rows or columns that the layer does not use."""
        return (self.padded_in, self.padded_out) != (self.in_features, self.out_features)

    @property
    def num_parameters(self) -> int:
        """Number of elements of all cores."""
        return sum(math.prod(shape) for shape in self.core_shapes)

    @property
    def dense_parameters(self) -> int:
        """Number of elements of the matrix that the cores stand for."""
        return self.in_features * self.out_features

    @property
    def compression(self) -> float:
        """Parameters of the cores over parameters of the matrix (below 1 is smaller)."""
        return self.num_parameters / self.dense_parameters

    @property
    def central_index(self) -> int:
        """Position of the central tensor, (n - 1) // 2; the other cores are auxiliary tensors."""
        return (self.num_cores - 1) // 2

    def transposed(self) -> MPOSpec:
        """Return the spec of W^T: its cores are those of W with the two middle axes swapped."""
        return MPOSpec(
            in_modes=self.out_modes,
            out_modes=self.in_modes,
            bonds=self.bonds,
            in_features=self.out_features,
            out_features=self.in_features,
            allow_redundant_bonds=self.allow_redundant_bonds,
        )


def exact_bonds(in_modes: Sequence[int], out_modes: Sequence[int]) -> tuple[int, ...]:
    """Return the bonds that represent every matrix of this shape without truncation.

    Args:
        in_modes: i_1..i_n.
        out_modes: j_1..j_n.

    Returns:
        ``d_k = min(prod_{m<=k} i_m j_m, prod_{m>k} i_m j_m)`` for k = 1..n-1 (Liu et al. 2021,
        arXiv 2106.02205, eq. 2).
    """
    sizes = [i * j for i, j in zip(in_modes, out_modes, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def capped_bonds(in_modes: Sequence[int], out_modes: Sequence[int], cap: int) -> tuple[int, ...]:
    """Return the exact bonds, none of them above `cap`."""
    return tuple(min(cap, bond) for bond in exact_bonds(in_modes, out_modes))


def layout_modes(
    in_modes: Sequence[int], out_modes: Sequence[int], layout: Layout = "ttm"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the in and out mode of every core.

    Args:
        in_modes: factors of the rows.
        out_modes: factors of the columns.
        layout: "ttm" pairs in mode k with out mode k (the shorter list is filled with ones at its
            end); "tt" gives each mode a core of its own, the out modes first (the tensor-train
            order of CoMERA, Yang et al. 2024, arXiv 2405.14377).

    Returns:
        Two tuples of equal length.
    """
    i, j = tuple(in_modes), tuple(out_modes)
    if layout == "tt":
        return (1,) * len(j) + i, j + (1,) * len(i)
    if layout != "ttm":
        raise SpecError(f"layout is {layout!r}; it must be 'ttm' or 'tt'")
    num_cores = max(len(i), len(j))
    return i + (1,) * (num_cores - len(i)), j + (1,) * (num_cores - len(j))


def mpo_spec(
    in_features: int,
    out_features: int,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
    *,
    bonds: Sequence[int] | None = None,
    cap: int | None = None,
    layout: Layout = "ttm",
) -> MPOSpec:
    """Return the spec of an in_features x out_features matrix.

    Args:
        in_features: rows of W.
        out_features: columns of W.
        in_modes: factors of the rows; their product may exceed `in_features` (zero padding).
        out_modes: factors of the columns, likewise.
        bonds: all inner bonds; excludes `cap`.
        cap: largest bond allowed; without `bonds` and `cap` the bonds are exact (full).
        layout: see `layout_modes`; with "tt" there is one core for each mode.

    Raises:
        SpecError: the parts do not fit together.
    """
    if bonds is not None and cap is not None:
        raise SpecError(f"give bonds = {list(bonds)} or cap = {cap}, not both")
    if cap is not None and not _is_count(cap):
        raise SpecError(f"cap is {cap!r}; it must be a whole number of at least 1")
    i, j = layout_modes(in_modes, out_modes, layout)
    _require(_mode_problems(i, j))
    if bonds is None:
        bonds = exact_bonds(i, j) if cap is None else capped_bonds(i, j, cap)
    return MPOSpec(i, j, tuple(bonds), in_features, out_features)


def ttm_spec(in_features: int, out_features: int, rank: int) -> MPOSpec:
    """Return the spec that the published TTM GPT-2 gives a layer at one rank.

    Args:
        in_features: rows of W.
        out_features: columns of W.
        rank: the rank r of the publication; see `mpotrain.tensor.ttm.ttm_shape` for the rule.

    Raises:
        SpecError: sizes or rank below 1, or a rank so large that a single core would remain.
    """
    in_modes, out_modes, bonds = ttm_shape(in_features, out_features, rank)
    return MPOSpec(
        in_modes, out_modes, bonds, in_features, out_features, allow_redundant_bonds=True
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _mode_problems(in_modes: tuple[int, ...], out_modes: tuple[int, ...]) -> list[str]:
    problems = [
        f"{side}_modes = {list(modes)}: every mode must be a whole number of at least 1"
        for side, modes in (("in", in_modes), ("out", out_modes))
        if not all(_is_count(mode) for mode in modes)
    ]
    if len(in_modes) != len(out_modes):
        problems.append(
            f"in_modes = {list(in_modes)} and out_modes = {list(out_modes)} must have the same "
            "length; fill the shorter one with ones"
        )
    elif len(in_modes) < 2:
        problems.append(
            f"in_modes = {list(in_modes)}, out_modes = {list(out_modes)} make {len(in_modes)} "
            "core(s); at least 2 are needed"
        )
    return problems


def _size_problems(side: str, modes: tuple[int, ...], size: int) -> list[str]:
    product = math.prod(modes)
    if not _is_count(size):
        return [f"{side}_features is {size!r}; it must be a whole number of at least 1"]
    if product < size:
        return [
            f"{side}_modes = {list(modes)} multiply to {product}, but {side}_features is {size}"
        ]
    return []


def _require(problems: list[str]) -> None:
    if problems:
        raise SpecError("; ".join(problems))
