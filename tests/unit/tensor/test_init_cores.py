"""Initialisation: the spread of W, the orthogonality of the cores, redundant bonds."""

from __future__ import annotations

import math

import pytest
import torch
from tensor_cases import SPECS, random_cores

from mpotrain.errors import SpecError
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.init import init_cores, orthogonalise
from mpotrain.tensor.spec import MPOSpec, mpo_spec, ttm_spec
from mpotrain.tensor.spectra import core_norms


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scheme", ["gaussian_qr", "gaussian", "balanced"])
@pytest.mark.parametrize(
    "spec",
    [ttm_spec(96, 128, 12), mpo_spec(120, 90, (5, 6, 4), (4, 5, 6)), ttm_spec(768, 768, 16)],
    ids=["ttm", "full and padded", "ttm 768"],
)
def test_spread_of_the_rebuilt_matrix(scheme, spec):
    """Mean square over several draws; W's elements are dependent, so the mean is what is exact."""
    squares = [
        float(rebuild(init_cores(spec, 0.02, scheme=scheme, generator=generator(s)), spec).var())
        for s in range(24)
    ]
    mean = sum(squares) / len(squares)
    spread = math.sqrt(sum((x - mean) ** 2 for x in squares) / (len(squares) - 1))
    error = max(4 * spread / math.sqrt(len(squares)), 0.01 * mean)
    assert error < 0.5 * 0.02**2
    assert abs(mean - 0.02**2) < error


def test_xavier_spread():
    spec = mpo_spec(300, 200, (10, 6, 5), (5, 8, 5), cap=30)
    squares = [
        float(rebuild(init_cores(spec, scheme="xavier", generator=generator(s)), spec).var())
        for s in range(16)
    ]
    assert sum(squares) / 16 == pytest.approx(2 / 500, rel=0.05)


def test_published_spread():
    """TTM GPT-2: std 0.0202 +- 0.0012 at rank 16 and 0.0199 +- 0.0003 at rank 80."""
    for rank, tolerance in ((16, 0.004), (80, 0.001)):
        spec = ttm_spec(768, 3072, rank)
        matrix = rebuild(init_cores(spec, 0.02, generator=generator(1)), spec)
        assert float(matrix.std()) == pytest.approx(0.02, abs=tolerance)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_qr_changes_neither_the_matrix_nor_the_shapes(spec):
    cores = random_cores(spec, grad=False)
    other = orthogonalise(cores)
    assert tuple(tuple(core.shape) for core in other) == spec.core_shapes
    torch.testing.assert_close(rebuild(other, spec), rebuild(cores, spec), rtol=1e-11, atol=1e-12)
    for core in other[:-1]:
        matrix = core.reshape(-1, core.shape[3])
        if matrix.shape[0] >= matrix.shape[1]:
            gram, size = matrix.t() @ matrix, matrix.shape[1]
        else:
            gram, size = matrix @ matrix.t(), matrix.shape[0]
        torch.testing.assert_close(gram, torch.eye(size, dtype=torch.float64))


def test_gaussian_qr_is_gaussian_in_another_gauge():
    spec = ttm_spec(96, 128, 12)
    plain = init_cores(spec, 0.5, scheme="gaussian", generator=generator(), dtype=torch.float64)
    turned = init_cores(spec, 0.5, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(rebuild(turned, spec), rebuild(plain, spec))


def test_no_slice_is_dead_with_redundant_bonds():
    """A first core with 4 rows and a bond of 6 cannot have 6 orthonormal columns."""
    spec = MPOSpec((2, 3, 2), (2, 2, 2), (6, 30), allow_redundant_bonds=True)
    cores = [core.requires_grad_() for core in init_cores(spec, 1.0, generator=generator())]
    rebuild(cores, spec).square().sum().backward()
    for core in cores:
        assert bool((core.grad.abs().sum((0, 1, 2)) > 0).all())
        assert bool((core.grad.abs().sum((1, 2, 3)) > 0).all())


def test_balanced_cores_have_equal_spread():
    spec = mpo_spec(300, 200, (10, 6, 5), (5, 8, 5), cap=30)
    cores = init_cores(spec, 0.02, scheme="balanced", generator=generator())
    rms = [
        norm / math.sqrt(core.numel()) for norm, core in zip(core_norms(cores), cores, strict=True)
    ]
    assert max(rms) / min(rms) < 1.2


def test_same_seed_same_bits():
    spec = ttm_spec(96, 128, 12)
    for scheme in ("gaussian_qr", "balanced"):
        one, two, three = (
            init_cores(spec, 0.02, scheme=scheme, generator=generator(seed)) for seed in (5, 5, 6)
        )
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert not torch.equal(one[0], three[0])


def test_dtype_device_and_zero_std():
    spec = ttm_spec(96, 128, 12)
    assert init_cores(spec, 0.02, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert init_cores(spec, 0.02, device="meta")[0].device.type == "meta"
    zero = init_cores(spec, 0.0, generator=generator())
    assert not rebuild(zero, spec).any()
    assert all(bool(torch.isfinite(core).all()) for core in zero)


def test_bad_requests_are_refused():
    spec = ttm_spec(96, 128, 12)
    for arguments in ({"std": None}, {"std": -1.0}, {"std": 1.0, "scheme": "magic"}):
        with pytest.raises(SpecError):
            init_cores(spec, **arguments)
