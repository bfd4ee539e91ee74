"""Depth scaling of auxiliary tensors, and draws that fit one another."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.nn.deep_init import (
    auxiliary_factors,
    draw_operator,
    join_cores,
    split_cores,
)
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.spec import MPOSpec, mpo_spec


def spec_of(num_cores: int) -> MPOSpec:
    return mpo_spec(2**num_cores, 2**num_cores, (2,) * num_cores, (2,) * num_cores)


@given(depth=st.integers(1, 1000), num_cores=st.sampled_from([3, 5, 7, 9]))
def test_corollary_a2_holds_exactly_for_scaling_per_side(depth: int, num_cores: int) -> None:
    factors = auxiliary_factors(spec_of(num_cores), "per_side", depth)
    assert len(factors) == num_cores - 1
    half = len(factors) // 2
    u, v = prod(factors[:half]), prod(factors[half:])
    assert sum((u**2 + v**2) * u * v for _ in range(depth)) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("num_cores", "scale", "wanted"),
    [
        (5, "none", [1.0] * 4),
        (5, "per_side", [96**-0.125] * 4),
        (5, "per_tensor", [96**-0.25] * 4),
        (3, "per_side", [96**-0.25] * 2),
        # One auxiliary tensor left, two right; and none left of the first of two cores.
        (4, "per_side", [96**-0.25, 96**-0.125, 96**-0.125]),
        (2, "per_side", [96**-0.25]),
        (2, "per_tensor", [96**-0.25]),
    ],
)
def test_factors(num_cores: int, scale: Any, wanted: list[float]) -> None:
    assert auxiliary_factors(spec_of(num_cores), scale, 48) == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize(("scale", "power"), [("per_side", -0.5), ("per_tensor", -1.0)])
@pytest.mark.parametrize("depth", [1, 12, 48])
def test_scaling_multiplies_the_norm_of_a_matrix_exactly(
    scale: Any, power: float, depth: int
) -> None:
    spec = mpo_spec(48, 96, (2, 2, 3, 2, 2), (2, 2, 4, 3, 2))
    site = MPOSite(in_modes=spec.in_modes, out_modes=spec.out_modes)
    central, auxiliaries = draw_operator(spec, site, 0.1, torch.Generator().manual_seed(0))
    factors = auxiliary_factors(spec, scale, depth)
    scaled = [f * core.double() for f, core in zip(factors, auxiliaries, strict=True)]
    plain = [core.double() for core in auxiliaries]
    norms = [
        float(rebuild(join_cores(central.double(), cores, spec), spec).norm())
        for cores in (scaled, plain)
    ]
    assert norms[0] / norms[1] == pytest.approx((2 * depth) ** power, rel=1e-12)


@pytest.mark.parametrize("num_cores", [2, 3, 4, 5])
def test_cores_are_split_and_joined(num_cores: int) -> None:
    spec = spec_of(num_cores)
    cores = [torch.randn(shape) for shape in spec.core_shapes]
    central, auxiliaries = split_cores(cores, spec)
    assert central is cores[spec.central_index]
    joined = join_cores(central, auxiliaries, spec)
    assert all(one is other for one, other in zip(joined, cores, strict=True))


@pytest.mark.parametrize("init", ["gaussian_qr", "balanced", "xavier"])
@pytest.mark.parametrize("rank", [None, 24, 80])
def test_parts_of_different_draws_make_matrices_of_the_wanted_spread(
    init: Any, rank: int | None
) -> None:
    site: MPOSite | TTMSite = MPOSite(in_modes=(4, 4, 4), out_modes=(4, 4, 4), init=init)
    if rank is not None:
        site = TTMSite(rank=rank, init=init)
    spec = site.spec(64, 64)
    generator = torch.Generator().manual_seed(1)
    squares = []
    for _ in range(24):
        central, _ = draw_operator(spec, site, 0.05, generator)
        _, auxiliaries = draw_operator(spec, site, 0.05, generator)
        squares.append(rebuild(join_cores(central, auxiliaries, spec), spec).square().mean())
    wanted = 0.125 if init == "xavier" else 0.05
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(wanted, rel=0.06)
