"""Decomposition: exactness, error identities and bounds, gauges, limits, degenerate matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_cases import random_cores, random_tensor, specs

from mpotrain.errors import SpecError
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.decompose import decompose
from mpotrain.tensor.spec import exact_bonds, mpo_spec

SHAPES = {
    2: ((4, 6), (5, 3)),
    3: ((3, 4, 2), (2, 3, 5)),
    4: ((2, 3, 2, 2), (2, 2, 3, 2)),
    5: ((3, 2, 2, 2, 2), (2, 2, 2, 3, 2)),
    7: ((2, 1, 2, 2, 2, 1, 2), (1, 2, 2, 3, 1, 2, 2)),
    9: ((2, 1, 2, 1, 2, 1, 2, 1, 2), (1, 2, 1, 2, 1, 2, 1, 2, 1)),
}
GAUGES = ["canonical", "left"]


def unfoldings(weight, in_modes, out_modes):
    """Every unfolding of W by explicit index arithmetic, independent of the library."""
    n = len(in_modes)
    apart = weight.reshape(*in_modes, *out_modes)
    mixed = apart.permute([axis for k in range(n) for axis in (k, n + k)])
    sizes = [i * j for i, j in zip(in_modes, out_modes, strict=True)]
    return [mixed.reshape(math.prod(sizes[:k]), -1) for k in range(1, n)]


def error(weight, result):
    return float((weight.double() - rebuild(result.cores, result.spec).double()).norm())


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("n", SHAPES)
def test_exact_without_limits(n, gauge):
    i, j = SHAPES[n]
    weight = random_tensor(math.prod(i), math.prod(j))
    result = decompose(weight, i, j, gauge=gauge)
    assert result.spec.bonds == exact_bonds(i, j)
    assert error(weight, result) < 1e-12 * weight.norm()
    assert result.error_bound == 0.0
    for values, unfolding in zip(result.spectra, unfoldings(weight, i, j), strict=True):
        torch.testing.assert_close(values, torch.linalg.svdvals(unfolding))


def test_real_size_in_float32():
    weight = random_tensor(768, 3072, dtype=torch.float32) * 0.02
    result = decompose(weight, (8, 12, 8), (12, 16, 16))
    assert result.cores[0].dtype == torch.float32
    assert error(weight, result) < 1e-5 * weight.norm()


def test_two_cores_are_a_plain_svd():
    i, j = SHAPES[2]
    weight = random_tensor(24, 15)
    result = decompose(weight, i, j, cap=3)
    (unfolding,) = unfoldings(weight, i, j)
    values = torch.linalg.svdvals(unfolding)
    assert error(weight, result) == pytest.approx(float(values[3:].norm()), rel=1e-10)
    assert result.error_bound == pytest.approx(float(values[3:].norm()), rel=1e-10)


def test_wrong_permutation_would_show_in_the_error():
    """A matrix that is one product over the right modes has bond 1 and error 0 only there."""
    cores = random_cores(mpo_spec(24, 30, (2, 3, 4), (5, 3, 2), cap=1), grad=False)
    weight = rebuild(cores, mpo_spec(24, 30, (2, 3, 4), (5, 3, 2), cap=1))
    right = decompose(weight, (2, 3, 4), (5, 3, 2), cap=1)
    assert right.relative_error_bound < 1e-14
    assert error(weight, right) < 1e-13 * weight.norm()
    wrong = decompose(weight, (4, 3, 2), (5, 3, 2), cap=1)
    assert error(weight, wrong) > 0.1 * weight.norm()


@pytest.mark.parametrize("n", [3, 4, 5, 7])
def test_sequential_sweep_error_is_an_equality(n):
    i, j = SHAPES[n]
    weight = random_tensor(math.prod(i), math.prod(j))
    result = decompose(weight, i, j, cap=3, gauge="left")
    lost = 0.0
    (remainder,) = unfoldings(weight, i, j)[:1]
    for k, (left, rows, columns, right) in enumerate(result.spec.core_shapes[:-1]):
        u, s, v = torch.linalg.svd(remainder.reshape(left * rows * columns, -1), False)
        lost += float(s[right:].square().sum())
        remainder = s[:right, None] * v[:right]
        matrix = result.cores[k].reshape(-1, right)
        torch.testing.assert_close(matrix.t() @ matrix, torch.eye(right, dtype=torch.float64))
        assert u.shape[0] == matrix.shape[0]
    assert error(weight, result) ** 2 == pytest.approx(lost, rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(spec=specs(), gauge=st.sampled_from(GAUGES), seed=st.integers(0, 99))
def test_two_sided_error_bound(spec, gauge, seed):
    weight = random_tensor(spec.in_features, spec.out_features, seed=seed)
    result = decompose(weight, spec.in_modes, spec.out_modes, bonds=spec.bonds, gauge=gauge)
    assert result.spec == spec
    eps = [float(s[d:].norm()) for s, d in zip(result.spectra, spec.bonds, strict=True)]
    actual = error_padded(weight, result)
    slack = 1e-11 * float(weight.norm())
    assert max(eps) - slack <= actual <= result.error_bound + slack
    assert result.error_bound == pytest.approx(math.hypot(*eps), abs=slack)


def error_padded(weight, result):
    """Error over the padded matrix, which the cores approximate."""
    whole = mpo_spec(
        result.spec.padded_in,
        result.spec.padded_out,
        result.spec.in_modes,
        result.spec.out_modes,
        bonds=result.spec.bonds,
    )
    padded = torch.zeros(whole.in_features, whole.out_features, dtype=torch.float64)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return float((padded - rebuild(result.cores, whole)).norm())


@pytest.mark.parametrize("n", SHAPES)
def test_symmetric_gauge(n):
    """M_k^T M_k = N_k N_k^T = diag(s_k), s_k the singular values of unfolding k."""
    i, j = SHAPES[n]
    weight = random_tensor(math.prod(i), math.prod(j))
    result = decompose(weight, i, j)
    left = torch.ones(1, 1, dtype=torch.float64)
    for core, values in zip(result.cores[:-1], result.spectra, strict=True):
        left = torch.tensordot(left, core, dims=1).reshape(-1, core.shape[3])
        torch.testing.assert_close(left.t() @ left, torch.diag(values), rtol=1e-9, atol=1e-9)
    right = torch.ones(1, 1, dtype=torch.float64)
    for core, values in zip(result.cores[:0:-1], result.spectra[::-1], strict=True):
        right = torch.tensordot(core, right, dims=1).reshape(core.shape[0], -1)
        torch.testing.assert_close(right @ right.t(), torch.diag(values), rtol=1e-9, atol=1e-9)


def test_canonical_truncation_slices_the_exact_form():
    weight = random_tensor(24, 30)
    full = decompose(weight, (2, 3, 4), (5, 3, 2))
    cut = decompose(weight, (2, 3, 4), (5, 3, 2), bonds=(4, 3))
    for a, b, (left, _, _, right) in zip(full.cores, cut.cores, cut.spec.core_shapes, strict=True):
        torch.testing.assert_close(a[:left, :, :, :right], b)


def test_canonical_gauge_spreads_the_norm():
    weight = random_tensor(72, 96)
    modes = (3, 2, 3, 2, 2), (2, 2, 3, 4, 2)
    norms = {}
    for gauge in GAUGES:
        cores = decompose(weight, *modes, gauge=gauge).cores
        sizes = [float(core.norm()) for core in cores]
        norms[gauge] = max(sizes) / min(sizes)
    assert norms["canonical"] < 0.5 * norms["left"]


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("limits", [{}, {"cap": 2}, {"max_error": 0.1}, {"max_parameters": 60}])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_zero_and_rank_deficient_matrices(gauge, limits, rank):
    weight = random_tensor(24, rank) @ random_tensor(rank, 30, seed=2)
    weight[5:] = 0
    result = decompose(weight, (2, 3, 4), (5, 3, 2), gauge=gauge, **limits)
    assert all(bool(torch.isfinite(core).all()) for core in result.cores)
    assert error(weight, result) <= result.error_bound + 1e-10
    if not limits:
        assert error(weight, result) < 1e-12
    if rank == 0:
        assert result.relative_error_bound == 0.0
        assert result.entropies == (0.0, 0.0)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("max_error", [0.0, 0.05, 0.3, 0.9])
def test_requested_error_is_kept(gauge, max_error):
    i, j = SHAPES[5]
    weight = random_tensor(math.prod(i), math.prod(j))
    result = decompose(weight, i, j, max_error=max_error, gauge=gauge)
    assert error(weight, result) <= max_error * float(weight.norm()) + 1e-11
    assert result.relative_error_bound <= max_error * (1 + 1e-12)
    full = decompose(weight, i, j)
    assert (result.spec == full.spec) == (max_error < 0.1)
    if max_error:
        for k, bond in enumerate(result.spec.bonds):
            squares = sum(
                float(s[d - (m == k) :].square().sum())
                for m, (s, d) in enumerate(zip(result.spectra, result.spec.bonds, strict=True))
            )
            assert bond == 1 or squares > (max_error * float(weight.norm())) ** 2


@pytest.mark.parametrize("budget", [30, 100, 400, 10_000])
def test_parameter_budget_is_kept_and_used(budget):
    i, j = SHAPES[4]
    weight = random_tensor(math.prod(i), math.prod(j))
    result = decompose(weight, i, j, max_parameters=budget)
    assert result.spec.num_parameters <= budget
    exact = mpo_spec(24, 24, i, j)
    if budget >= exact.num_parameters:
        assert result.spec == exact
    else:
        largest_step = max(
            left * rows * columns + right * rows * columns
            for left, rows, columns, right in exact.core_shapes
        )
        assert result.spec.num_parameters > budget - 2 * largest_step


def test_parameter_budget_drops_what_matters_least():
    """A matrix of exact bonds (2, 2) under a budget that just allows them loses nothing."""
    small = mpo_spec(24, 30, (2, 3, 4), (5, 3, 2), cap=2)
    weight = rebuild(random_cores(small, grad=False), small)
    result = decompose(weight, (2, 3, 4), (5, 3, 2), max_parameters=small.num_parameters)
    assert result.spec.bonds == (2, 2)
    assert result.relative_error_bound < 1e-13


def test_too_small_budget_is_refused():
    with pytest.raises(SpecError, match="even bonds of 1 need 27"):
        decompose(random_tensor(24, 30), (2, 3, 4), (5, 3, 2), max_parameters=26)


def test_zero_padding():
    weight = random_tensor(22, 27)
    result = decompose(weight, (2, 3, 4), (5, 3, 2))
    assert (result.spec.in_features, result.spec.out_features) == (22, 27)
    assert error(weight, result) < 1e-12
    assert error_padded(weight, result) < 1e-12


@pytest.mark.parametrize("gauge", GAUGES)
def test_tt_layout(gauge):
    """In the TT order the bond between out and in modes is the rank of the matrix itself."""
    weight = random_tensor(24, 5) @ random_tensor(5, 30, seed=2)
    result = decompose(weight, (4, 6), (5, 6), layout="tt", bonds=(5, 5, 6), gauge=gauge)
    assert result.spec.in_modes == (1, 1, 4, 6)
    middle = result.spectra[1]
    torch.testing.assert_close(middle, torch.linalg.svdvals(weight)[: len(middle)])
    assert error(weight, result) < 1e-11


def test_entropies_of_a_flat_and_a_product_spectrum():
    flat = torch.linalg.qr(random_tensor(16, 16))[0]
    two = decompose(flat, (16, 1), (1, 16))
    assert two.entropies[0] == pytest.approx(math.log(16))
    ones = decompose(torch.ones(16, 16), (4, 4), (4, 4))
    assert ones.entropies[0] == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cap": 2, "max_error": 0.1},
        {"bonds": (2, 2), "max_parameters": 50},
        {"max_error": -0.1},
        {"gauge": "right"},
        {"bonds": (2, 99)},
    ],
)
def test_bad_requests_are_refused(arguments):
    with pytest.raises(SpecError):
        decompose(random_tensor(24, 30), (2, 3, 4), (5, 3, 2), **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(value):
    weight = random_tensor(24, 30)
    weight[3, 4] = value
    with pytest.raises(SpecError, match="finite"):
        decompose(weight, (2, 3, 4), (5, 3, 2))
