"""Cuts of features by periods, against a list of which feature lies where."""

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpotrain.engine.megatron.periods import Face, ModeCut, choose_period, common_periods
from mpotrain.tensor.spec import MPOSpec

MODES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=2, max_size=4).filter(
    lambda modes: prod(modes) <= 400
)


def face(modes: list[int], span: int | None = None, features: int | None = None) -> Face:
    ones = (1,) * len(modes)
    used = features or prod(modes)
    spec = MPOSpec(ones, tuple(modes), ones[1:], 1, used)
    return Face("site", used, spec, "out", span or used)


def owners_by_period(features: int, period: int, parts: int) -> list[int]:
    """Return the rank that has each feature: of every `period` features each rank has one part."""
    return [feature % period // (period // parts) for feature in range(features)]


def owners_by_mode(modes: list[int], cut: ModeCut, parts: int) -> list[int]:
    """Return the rank that has each feature where the values of one mode are shared out."""
    below = prod(modes[cut.core + 1 :])
    size = cut.period // parts
    return [
        feature // below % modes[cut.core] % cut.period // size for feature in range(prod(modes))
    ]


@settings(max_examples=150, deadline=None)
@given(MODES, st.sampled_from([2, 3, 4]))
def test_a_period_and_its_mode_mean_the_same_features(modes: list[int], parts: int) -> None:
    one, features = face(modes), prod(modes)
    found = one.periods(parts)
    for period in found:
        cut = one.cut(period, parts)
        assert cut is not None
        assert modes[cut.core] % cut.period == 0
        assert cut.period % parts == 0
        assert owners_by_mode(modes, cut, parts) == owners_by_period(features, period, parts)


@settings(max_examples=150, deadline=None)
@given(MODES, st.sampled_from([2, 3, 4]))
def test_every_cut_of_a_mode_is_offered(modes: list[int], parts: int) -> None:
    expected = {
        values * prod(modes[core + 1 :])
        for core, mode in enumerate(modes)
        for values in range(1, mode + 1)
        if mode % values == 0 and values % parts == 0
    }
    assert face(modes).periods(parts) == expected


def test_a_whole_mode_behind_another_core_can_be_cut() -> None:
    # 4 consecutive values of the features are all values of the last mode.
    assert face([3, 4, 4]).cut(4, 2) == ModeCut(core=2, period=4)
    assert face([3, 4, 4]).cut(16, 4) == ModeCut(core=1, period=4)
    assert face([3, 4, 1, 1]).cut(4, 2) == ModeCut(core=1, period=4)


def test_dense_matrices_take_any_period_and_padded_ones_none() -> None:
    dense = Face("site", 24, None, "out", 12)
    assert dense.periods(2) == {2, 4, 6, 12}
    assert dense.cut(4, 2) is None
    padded = face([5, 5], features=24)
    assert padded.is_padded()
    assert padded.periods(2) == set()


def test_in_and_out_modes_are_those_of_their_side() -> None:
    spec = MPOSpec((2, 3), (5, 4), (1,))
    assert Face("site", 6, spec, "in", 6).modes() == (2, 3)
    assert Face("site", 20, spec, "out", 20).modes() == (5, 4)


@pytest.mark.parametrize(("parts", "expected"), [(2, 128), (4, 256)])
def test_parts_are_made_of_whole_units(parts: int, expected: int) -> None:
    faces = [face([4, 4, 4, 4])]
    assert min(common_periods(faces, parts, unit=64)) == expected
    assert all((period // parts) % 64 == 0 for period in common_periods(faces, parts, unit=64))


def test_the_largest_core_is_cut() -> None:
    spec = MPOSpec((1, 1, 1), (4, 4, 4), (4, 4))  # sizes 16, 64, 16
    wide = Face("wide", 64, spec, "out", 64)
    assert choose_period([wide], 2) == 16
    assert wide.cut(16, 2) == ModeCut(core=1, period=4)
    # A dense matrix on the other side takes part and has no say.
    assert choose_period([wide, Face("dense", 64, None, "in", 64)], 2) == 16
    assert choose_period([wide], 1) == 64
    # Where nothing is tensorized features lie in blocks.
    assert choose_period([Face("dense", 64, None, "in", 64)], 2) == 64


def test_no_common_period() -> None:
    assert choose_period([face([2, 9]), face([9, 2])], 2) is None
    assert choose_period([face([2, 9]), face([2, 9])], 2) == 18
    assert choose_period([face([3, 5])], 2) is None
