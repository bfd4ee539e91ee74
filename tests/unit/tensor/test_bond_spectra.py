"""Spectra without building W, and the entropies read from them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_cases import SPECS, random_cores, random_tensor, specs

from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.decompose import decompose
from mpotrain.tensor.spec import MPOSpec, mpo_spec
from mpotrain.tensor.spectra import (
    bond_spectra,
    core_norms,
    entanglement_entropy,
    normalised_entropies,
)


def check_against_unfoldings(spec, cores):
    whole = MPOSpec(spec.in_modes, spec.out_modes, spec.bonds, allow_redundant_bonds=True)
    n = spec.num_cores
    tensor = rebuild(cores, whole).detach().reshape(*spec.in_modes, *spec.out_modes)
    mixed = tensor.permute([axis for k in range(n) for axis in (k, n + k)])
    rows = 1
    for k, values in enumerate(bond_spectra(cores)):
        rows *= spec.in_modes[k] * spec.out_modes[k]
        expected = torch.linalg.svdvals(mixed.reshape(rows, -1))
        kept = min(len(values), len(expected))
        torch.testing.assert_close(values[:kept], expected[:kept], rtol=1e-9, atol=1e-9)
        assert float(expected[kept:].norm()) < 1e-9
        assert float(values[kept:].norm()) < 1e-9


@settings(max_examples=40, deadline=None)
@given(specs(), st.integers(0, 99))
def test_spectra_are_those_of_the_unfoldings(spec, seed):
    check_against_unfoldings(spec, random_cores(spec, seed, grad=False))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_spectra_of_all_cases(spec):
    check_against_unfoldings(spec, random_cores(spec))


def test_spectra_agree_with_the_decomposition():
    weight = random_tensor(24, 30)
    result = decompose(weight, (2, 3, 4), (5, 3, 2))
    for a, b in zip(bond_spectra(result.cores), result.spectra, strict=True):
        torch.testing.assert_close(a, b)


def test_zero_cores():
    spec = SPECS["3 cores"]
    spectra = bond_spectra([torch.zeros(shape) for shape in spec.core_shapes])
    assert all(not values.any() for values in spectra)
    assert normalised_entropies(spectra) == [0.0, 0.0]


def test_entropy_values():
    flat = torch.ones(8, dtype=torch.float64)
    assert entanglement_entropy(flat) == pytest.approx(math.log(8))
    assert entanglement_entropy(3 * flat) == pytest.approx(math.log(8))
    assert entanglement_entropy(torch.tensor([2.0, 0.0, 0.0])) == 0.0
    two = torch.tensor([3.0, 4.0])
    p = 9 / 25
    by_hand = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert entanglement_entropy(two) == pytest.approx(by_hand)
    amplitude = -(0.6 * math.log(0.6) + 0.8 * math.log(0.8))
    assert entanglement_entropy(two, "amplitude") == pytest.approx(amplitude)
    assert entanglement_entropy(torch.zeros(3)) == 0.0
    assert normalised_entropies([flat, two.double(), torch.ones(1)]) == [
        pytest.approx(1.0),
        pytest.approx(by_hand / math.log(2)),
        0.0,
    ]


def test_core_norms():
    spec = mpo_spec(6, 6, (2, 3), (3, 2))
    cores = random_cores(spec)
    assert core_norms(cores) == [pytest.approx(float(core.detach().norm())) for core in cores]
