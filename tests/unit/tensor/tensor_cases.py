"""Specs, random cores and brute-force references shared by the tests of `mpotrain.tensor`."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from mpotrain.tensor.plan import PROFILES, ContractionPlan, plan_contraction
from mpotrain.tensor.spec import MPOSpec, exact_bonds, mpo_spec, ttm_spec

SPECS = {
    "2 cores": mpo_spec(20, 42, (4, 5), (6, 7), cap=6),
    "3 cores": mpo_spec(24, 30, (2, 3, 4), (5, 3, 2)),
    "4 cores, ttm rule": ttm_spec(24, 32, 4),
    "5 cores, padded": mpo_spec(45, 70, (3, 2, 2, 2, 2), (2, 3, 2, 3, 2), cap=5),
    "rows padded alone": mpo_spec(22, 24, (2, 3, 4), (4, 3, 2), cap=4),
    "redundant bonds": MPOSpec((2, 3, 2), (2, 2, 1), (6, 5), allow_redundant_bonds=True),
    "tt layout": mpo_spec(12, 15, (3, 4), (3, 5), cap=4, layout="tt"),
    "bonds of one": mpo_spec(8, 8, (2, 2, 2), (2, 2, 2), cap=1),
}

FORCES = ["materialise", "keep", "chain:lr", "chain:rl", "groups:lr", "groups:rl"]
"""Every kind of plan; "keep" is materialise with the weight kept."""

SPECS_AND_FORCES = {
    f"{name}, {force}": (spec, force)
    for name, spec in SPECS.items()
    for force in FORCES
    if spec.num_cores > 2 or not force.startswith("groups")
}


def make_plan(spec: MPOSpec, force: str, tokens: int = 6) -> ContractionPlan:
    keep = force == "keep"
    return plan_contraction(
        spec,
        tokens,
        "fp32",
        PROFILES["cpu"],
        force="materialise" if keep else force,
        keep_weight=keep,
    )


@st.composite
def specs(draw: st.DrawFn, most_cores: int = 5) -> MPOSpec:
    """Draw any valid small spec: modes, truncated bonds and padding."""
    n = draw(st.integers(2, most_cores))
    mode = st.integers(1, 4 if n <= 3 else 2)
    i = tuple(draw(mode) for _ in range(n))
    j = tuple(draw(mode) for _ in range(n))
    bonds = tuple(draw(st.integers(1, min(most, 6))) for most in exact_bonds(i, j))
    rows, columns = math.prod(i), math.prod(j)
    used_rows = draw(st.integers(max(1, rows - 3), rows))
    used_columns = draw(st.integers(max(1, columns - 3), columns))
    return MPOSpec(i, j, bonds, used_rows, used_columns)


def random_cores(
    spec: MPOSpec, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cores = [
        torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[0])
        for shape in spec.core_shapes
    ]
    return [core.to(dtype).requires_grad_(grad) for core in cores]


def random_tensor(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def matrix_by_definition(cores: list[Tensor], spec: MPOSpec) -> Tensor:
    """W element by element: a product of core slices for every pair of multi-indices."""
    matrix = torch.zeros(spec.padded_in, spec.padded_out, dtype=torch.float64)
    for row, i in enumerate(itertools.product(*map(range, spec.in_modes))):
        for column, j in enumerate(itertools.product(*map(range, spec.out_modes))):
            product = torch.ones(1, 1, dtype=torch.float64)
            for core, a, b in zip(cores, i, j, strict=True):
                product = product @ core[:, a, b, :].detach().double()
            matrix[row, column] = product[0, 0]
    return matrix[: spec.in_features, : spec.out_features]
