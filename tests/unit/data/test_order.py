from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpotrain.data.order import (
    BLEND_BLOCK,
    BlendOrder,
    FeistelPermutation,
    blend_counts,
    derive_key,
    splitmix64,
    splitmix64_array,
)


def test_splitmix64_gives_the_published_sequence():
    # First outputs of the reference implementation (Vigna, splitmix64.c) for state 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    golden = 0x9E3779B97F4A7C15
    assert [splitmix64(1234567 + k * golden) for k in range(5)] == published


def test_array_and_scalar_mix_agree():
    values = np.array([0, 1, 2**31, 2**63, 2**64 - 1, 1234567], dtype=np.uint64)
    assert splitmix64_array(values).tolist() == [splitmix64(int(value)) for value in values]


def test_derived_keys_depend_on_every_part_and_on_order():
    keys = {derive_key(*p) for p in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0)]}
    assert len(keys) == 8
    assert derive_key(-1) == derive_key(2**64 - 1)


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permutation_is_a_bijection_for_every_small_size(key):
    for n in [*range(1, 130), 1000, 4095, 4096, 4097]:
        permutation = FeistelPermutation(n, key)
        images = permutation.many(np.arange(n))
        assert np.array_equal(np.sort(images), np.arange(n)), n
        assert [permutation(index) for index in range(n)] == images.tolist()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_scalar_and_vector_agree_and_stay_inside(n, key, data):
    permutation = FeistelPermutation(n, key)
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    images = [permutation(index) for index in indices]
    assert permutation.many(indices).tolist() == images
    assert len(set(images)) == len(indices)
    assert all(0 <= image < n for image in images)


def test_million_points_of_a_trillion_do_not_collide():
    images = FeistelPermutation(10**12, 3).many(np.arange(10**6) * 999_983)
    assert len(np.unique(images)) == 10**6
    # A uniform draw fills 100 equal bins with 10,000 each, standard deviation 100.
    bins = np.bincount(images // 10**10, minlength=100)
    assert np.abs(bins - 10_000).max() < 600


def test_all_orders_of_five_points_are_about_equally_likely():
    orders = Counter(
        tuple(FeistelPermutation(5, key).many(np.arange(5)).tolist()) for key in range(12_000)
    )
    assert len(orders) == 120
    chi_square = sum((count - 100) ** 2 / 100 for count in orders.values())
    # 119 degrees of freedom: mean 119, standard deviation 15.4; keys are fixed, so is the value.
    assert chi_square < 119 + 4 * 15.4


def test_neighbours_do_not_stay_neighbours():
    n = 50_000
    images = FeistelPermutation(n, 9).many(np.arange(n))
    # A random permutation keeps n * (1/n) = 1 successor on average (Poisson).
    assert int((np.diff(images) == 1).sum()) < 8
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 5 / math.sqrt(n)


def test_keys_give_different_orders():
    first, second = (FeistelPermutation(1000, key).many(np.arange(1000)) for key in (1, 2))
    assert int((first == second).sum()) < 12


def test_indices_outside_are_refused():
    permutation = FeistelPermutation(10, 0)
    for bad in (-1, 10):
        with pytest.raises(IndexError):
            permutation(bad)
        with pytest.raises(IndexError):
            permutation.many([0, bad])
    with pytest.raises(ValueError, match="at least one point"):
        FeistelPermutation(0, 0)


WEIGHTS = [[1.0], [0.7, 0.2, 0.1], [3, 3, 3], [1, 1e-4], [0.5] * 7, [5.0, 1e-3, 2.5, 0.3]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_blend_is_exact_in_a_block_and_reads_each_source_in_order(weights):
    order = BlendOrder(weights)
    shares = np.array(weights) / sum(weights)
    assert sum(order.counts) == BLEND_BLOCK
    assert np.abs(np.array(order.counts) - shares * BLEND_BLOCK).max() < 1
    following = [0] * len(weights)
    for index in range(2 * BLEND_BLOCK):
        source, within = order(index)
        assert within == following[source]
        following[source] += 1
        if index == BLEND_BLOCK - 1:
            assert tuple(following) == order.counts
    assert following == [2 * count for count in order.counts]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_of_a_blend_keeps_the_proportions(weights):
    order = BlendOrder(weights)
    sources = np.array([order(index)[0] for index in range(BLEND_BLOCK)])
    lengths = np.arange(1, BLEND_BLOCK + 1)
    for source, count in enumerate(order.counts):
        expected = lengths * count / BLEND_BLOCK
        assert np.abs(np.cumsum(sources == source) - expected).max() <= 1 + len(weights)


def test_position_is_the_inverse_far_beyond_the_first_block():
    order = BlendOrder([0.7, 0.2, 0.1])
    for index in [0, 1, 65_535, 65_536, 10**9 + 7, 10**15]:
        assert order.position(*order(index)) == index


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_counts_are_within_one_sample_of_the_weights(weights):
    counts = blend_counts(weights)
    assert sum(counts) == BLEND_BLOCK
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - weight / math.fsum(weights) * BLEND_BLOCK) <= 1 + 1e-6


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [math.nan], [math.inf, 1.0]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="positive and finite"):
        blend_counts(weights)


def test_a_weight_below_one_sample_in_a_block_is_refused_and_named():
    with pytest.raises(ValueError, match=r"weight 1e-06 .*65,536"):
        blend_counts([1.0, 1e-6])


def test_negative_positions_are_refused():
    with pytest.raises(IndexError):
        BlendOrder([1.0])(-1)
