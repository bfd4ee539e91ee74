"""MPOSpec: shapes, sizes, errors; the published numbers that follow from shapes alone."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from tensor_cases import specs

from mpotrain.errors import SpecError
from mpotrain.tensor.spec import MPOSpec, capped_bonds, exact_bonds, mpo_spec, ttm_spec


@pytest.mark.parametrize(
    ("in_modes", "out_modes", "bonds", "total", "central"),
    [
        ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (12, 192, 384, 16), 2_544_016, 2_359_296),
        ((4, 4, 4, 4, 3), (4, 4, 8, 6, 4), (16, 256, 288, 12), 2_508_176, 2_359_296),
        ((4, 4, 4, 4, 4), (4, 4, 8, 8, 4), (16, 256, 512, 16), 4_522_496, 4_194_304),
        ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3), (12, 192, 192, 12), 663_840, 589_824),
        ((4, 4, 4, 4, 3), (4, 4, 4, 4, 3), (16, 256, 144, 9), 676_433, 589_824),
        ((4, 4, 4, 4, 4), (4, 4, 4, 4, 4), (16, 256, 256, 16), 1_180_160, 1_048_576),
        ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2), (10, 200, 480, 12), 4_110_644, 3_840_000),
    ],
)
def test_published_full_bond_shapes(in_modes, out_modes, bonds, total, central):
    spec = mpo_spec(math.prod(in_modes), math.prod(out_modes), in_modes, out_modes)
    assert spec.bonds == bonds
    assert spec.num_parameters == total
    assert math.prod(spec.core_shapes[spec.central_index]) == central
    assert spec.compression == total / (math.prod(in_modes) * math.prod(out_modes))


def test_prr_2020_network_sizes():
    first = mpo_spec(784, 256, (4, 7, 7, 4), (4, 4, 4, 4), cap=2)
    second = mpo_spec(256, 10, (4, 4, 4, 4), (1, 1, 10, 1), cap=4)
    assert (first.num_parameters, second.num_parameters) == (288, 736)
    wide = mpo_spec(784, 256, (4, 7, 7, 4), (4, 4, 4, 4), cap=16)
    assert wide.num_parameters + second.num_parameters == 15_584


TTM_TABLE = [
    (768, 3072, 16, [(4, 4)] * 4 + [(3, 12)], 13_120),
    (768, 3072, 32, [(8, 8), (8, 8), (12, 8), (1, 6)], 166_080),
    (768, 3072, 64, [(8, 8), (8, 8), (12, 8), (1, 6)], 659_840),
    (768, 3072, 72, [(16, 16), (16, 16), (3, 12)], 1_348_128),
    (768, 3072, 80, [(16, 16), (16, 16), (3, 12)], 1_661_760),
    (1024, 4096, 16, [(4, 4)] * 5 + [(1, 4)], 16_704),
    (1024, 4096, 32, [(8, 8)] * 3 + [(2, 8)], 133_632),
    (1024, 4096, 64, [(8, 8)] * 3 + [(2, 8)], 529_408),
    (1024, 4096, 72, [(16, 16), (16, 16), (4, 16)], 1_350_144),
    (1024, 4096, 80, [(16, 16), (16, 16), (4, 16)], 1_664_000),
]


@pytest.mark.parametrize(("rows", "columns", "rank", "pairs", "parameters"), TTM_TABLE)
def test_ttm_rule_gives_published_shapes_and_counts(rows, columns, rank, pairs, parameters):
    spec = ttm_spec(rows, columns, rank)
    assert list(zip(spec.in_modes, spec.out_modes, strict=True)) == pairs
    assert spec.num_parameters == parameters
    mirrored = ttm_spec(columns, rows, rank)
    assert list(zip(mirrored.out_modes, mirrored.in_modes, strict=True)) == pairs
    assert mirrored.num_parameters == parameters
    assert mirrored == spec.transposed()


def test_ttm_gpt2_totals():
    """Whole-model counts printed by the authors: dense minus MLP weights plus two TTM each."""
    dense, mlp = 124_439_808, 12 * 2 * 768 * 3072
    mlp_bias = 12 * (768 + 3072)
    for rank, total, bias in ((16, 68_085_504, 0), (32, 71_756_544, 0), (80, 107_698_944, 1)):
        cores = 12 * 2 * ttm_spec(768, 3072, rank).num_parameters
        assert dense - mlp - (1 - bias) * mlp_bias + cores == total
    medium = 354_823_168 - 24 * 2 * 1024 * 4096 + 24 * 2 * ttm_spec(1024, 4096, 72).num_parameters
    assert medium == 218_303_488


def test_ttm_rule_never_reduces_ranks_from_the_right():
    spec = ttm_spec(768, 3072, 64)
    assert spec.bonds == (64, 64, 64)
    assert exact_bonds(spec.in_modes, spec.out_modes)[-1] == 6
    for rank in range(1, 100):  # nor is there anything to reduce from the left
        spec = ttm_spec(768, 3072, rank)
        for left, i, j, right in spec.core_shapes[:-1]:
            assert right == rank <= left * i * j
    assert ttm_spec(8, 8, 3).bonds == (3,)


def test_ttm_rule_enlarges_and_pads():
    spec = ttm_spec(1000, 50257, 16)
    assert (spec.padded_in, spec.padded_out) == (1024, 52488)
    assert (spec.in_features, spec.out_features) == (1000, 50257)
    assert ttm_spec(7, 11, 2).padded_in == 8


@pytest.mark.parametrize("arguments", [(8, 8, 64), (0, 8, 2), (8, 8, 0)])
def test_ttm_rule_refuses(arguments):
    with pytest.raises(SpecError):
        ttm_spec(*arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"in_modes": (4,), "out_modes": (4,), "bonds": ()}, "at least 2 are needed"),
        ({"in_modes": (2, 2), "out_modes": (2, 2), "bonds": (2, 2)}, "2 cores have 1 inner bonds"),
        ({"in_modes": (2, 2), "out_modes": (2, 2), "bonds": (5,)}, "bond 1 is 5 but at most 4"),
        ({"in_modes": (2, 2), "out_modes": (2, 2), "bonds": (0,)}, "bond 1 is 0"),
        ({"in_modes": (2, 2), "out_modes": (2, 2, 1), "bonds": (2,)}, "same length"),
        ({"in_modes": (2, 0), "out_modes": (2, 2), "bonds": (2,)}, "in_modes = [2, 0]"),
        (
            {"in_modes": (2, 2), "out_modes": (2, 2), "bonds": (2,), "in_features": 5},
            "in_modes = [2, 2] multiply to 4, but in_features is 5",
        ),
        (
            {"in_modes": (2, 2), "out_modes": (2, 2), "bonds": (2,), "out_features": -1},
            "out_features",
        ),
    ],
)
def test_errors_name_the_mistake(arguments, text):
    with pytest.raises(SpecError) as caught:
        MPOSpec(**arguments)
    assert text in str(caught.value)


def test_all_problems_are_named_at_once():
    with pytest.raises(SpecError) as caught:
        MPOSpec((2, 2, 2), (2, 2, 2), (5, 9), in_features=9)
    text = str(caught.value)
    assert "in_features is 9" in text
    assert "bond 1 is 5 but at most 4" in text
    assert "bond 2 is 9 but at most 4" in text


def test_redundant_bonds_must_be_asked_for():
    spec = MPOSpec((2, 2), (2, 2), (5,), allow_redundant_bonds=True)
    assert spec.core_shapes == ((1, 2, 2, 5), (5, 2, 2, 1))


def test_bonds_and_cap_exclude_each_other():
    with pytest.raises(SpecError, match="not both"):
        mpo_spec(4, 4, (2, 2), (2, 2), bonds=(2,), cap=2)
    with pytest.raises(SpecError, match="cap is 0"):
        mpo_spec(4, 4, (2, 2), (2, 2), cap=0)
    with pytest.raises(SpecError, match="layout"):
        mpo_spec(4, 4, (2, 2), (2, 2), layout="ring")  # type: ignore[arg-type]


def test_shorter_modes_are_filled_with_ones_and_tt_layout():
    spec = mpo_spec(8, 6, (2, 2, 2), (3, 2))
    assert spec.out_modes == (3, 2, 1)
    tt = mpo_spec(8, 6, (2, 2, 2), (3, 2), layout="tt")
    assert tt.in_modes == (1, 1, 2, 2, 2)
    assert tt.out_modes == (3, 2, 1, 1, 1)
    assert tt.bonds == (3, 6, 4, 2)


@settings(max_examples=60, deadline=None)
@given(specs())
def test_shape_identities(spec):
    shapes = spec.core_shapes
    assert shapes[0][0] == shapes[-1][3] == 1
    assert all(a[3] == b[0] for a, b in itertools.pairwise(shapes))
    assert spec.num_parameters == sum(math.prod(shape) for shape in shapes)
    assert spec.transposed().transposed() == spec
    assert spec.central_index == (spec.num_cores - 1) // 2
    exact = exact_bonds(spec.in_modes, spec.out_modes)
    assert exact == exact_bonds(spec.in_modes[::-1], spec.out_modes[::-1])[::-1]
    peak = exact.index(max(exact))
    assert list(exact[: peak + 1]) == sorted(exact[: peak + 1])
    assert list(exact[peak:]) == sorted(exact[peak:], reverse=True)
    assert capped_bonds(spec.in_modes, spec.out_modes, 3) == tuple(min(3, d) for d in exact)


def test_spec_and_plan_do_not_import_torch():
    code = (
        "import sys, mpotrain.tensor.plan, mpotrain.tensor.spec;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
