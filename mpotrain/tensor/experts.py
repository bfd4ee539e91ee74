"""Sizes of experts that share the central tensor of a matrix product operator (no torch).

Expert e has the matrix W_e = A_1^e ... A_c^e C A_{c+1}^e ... A_{n-1}^e (Gao et al. 2022, section
3.1): one central tensor C for all E experts, auxiliary tensors of its own. For execution the
auxiliaries left of C count as one tensor L_e (iL, jL, d2), those right of it as R_e (d3, iR, jR).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mpotrain.errors import SpecError
from mpotrain.tensor.spec import MPOSpec, exact_bonds


@dataclass(frozen=True)
class ExpertShape:
    """Merged sizes of one expert's operator: W[iL i3 iR, jL j3 jR] = L C R.

    Attributes:
        left_in: product of the input modes left of the central tensor, iL.
        left_out: product of the output modes left of it, jL.
        left_bond: bond between left auxiliaries and central tensor, d2.
        central_in: input mode of the central tensor, i3.
        central_out: output mode of the central tensor, j3.
        right_bond: bond between central tensor and right auxiliaries, d3.
        right_in: product of the input modes right of the central tensor, iR.
        right_out: product of the output modes right of it, jR.
    """

    left_in: int
    left_out: int
    left_bond: int
    central_in: int
    central_out: int
    right_bond: int
    right_in: int
    right_out: int

    @classmethod
    def of(cls, spec: MPOSpec) -> ExpertShape:
        """Return the merged sizes of an operator with auxiliaries on both sides.

        Raises:
            SpecError: fewer than three cores, or a padded operator.
        """
        if spec.num_cores < 3 or spec.is_padded:
            raise SpecError(
                f"experts need at least 3 cores and no padding; got {spec.num_cores} cores, "
                f"{spec.padded_in} x {spec.padded_out} for {spec.in_features} x {spec.out_features}"
            )
        c = spec.central_index
        return cls(
            left_in=prod(spec.in_modes[:c]),
            left_out=prod(spec.out_modes[:c]),
            left_bond=spec.bonds[c - 1],
            central_in=spec.in_modes[c],
            central_out=spec.out_modes[c],
            right_bond=spec.bonds[c],
            right_in=prod(spec.in_modes[c + 1 :]),
            right_out=prod(spec.out_modes[c + 1 :]),
        )


def auxiliary_shapes(spec: MPOSpec) -> tuple[tuple[int, int, int, int], ...]:
    """Return the core shapes of one expert's auxiliary tensors, the central one left out."""
    c = spec.central_index
    return (*spec.core_shapes[:c], *spec.core_shapes[c + 1 :])


def num_expert_parameters(spec: MPOSpec, num_experts: int) -> int:
    """Return the parameters of all experts together: one central tensor, E sets of auxiliaries."""
    auxiliary = sum(prod(shape) for shape in auxiliary_shapes(spec))
    return prod(spec.core_shapes[spec.central_index]) + num_experts * auxiliary


def asymmetric_spec(
    in_features: int,
    out_features: int,
    in_mode: int,
    out_mode: int,
    in_bond: int | None = None,
    out_bond: int | None = None,
) -> MPOSpec:
    """Return the three-core operator whose left core acts on inputs and right core on outputs.

    Cores are (1, in_mode, 1, in_bond), (in_bond, I / in_mode, J / out_mode, out_bond) and
    (out_bond, 1, out_mode, 1).

    Args:
        in_features: rows I of W.
        out_features: columns J of W.
        in_mode: first input mode, divides I.
        out_mode: last output mode, divides J.
        in_bond: first bond, at most (and by default) `in_mode`.
        out_bond: second bond, at most (and by default) `out_mode`.

    Raises:
        SpecError: a mode does not divide its size, or a bond is larger than its mode.
    """
    problems = []
    for side, mode, size in (("in", in_mode, in_features), ("out", out_mode, out_features)):
        if mode < 1 or size % mode:
            near = [d for d in range(1, size + 1) if size % d == 0 and d <= 2 * max(mode, 1)][-3:]
            problems.append(
                f"{side}_mode {mode} does not divide {size}; divisors near it: "
                f"{', '.join(map(str, near))}"
            )
    bonds = (in_mode if in_bond is None else in_bond, out_mode if out_bond is None else out_bond)
    if problems:
        raise SpecError("\n".join(problems))
    modes = (in_mode, in_features // in_mode, 1), (1, out_features // out_mode, out_mode)
    for side, bond, mode, most in zip(
        ("in", "out"), bonds, (in_mode, out_mode), exact_bonds(*modes), strict=True
    ):
        if not 1 <= bond <= most:
            problems.append(
                f"{side}_bond {bond} (absent = {side}_mode {mode}) must be 1 to {most}; set "
                f"{side}_bond={most}"
            )
    if problems:
        raise SpecError("\n".join(problems))
    return MPOSpec(*modes, bonds, in_features, out_features)
