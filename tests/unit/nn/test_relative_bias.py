"""Relative positions of T5 against the published formula and a loop over pairs."""

import math

import pytest
import torch

from mpotrain.nn.relative_bias import RelativeBias, bucket_table, distance_bucket


def published_bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """Raffel et al. 2020 in floating point, as the T5 code writes it down."""
    single = num_buckets // 2
    if distance < single:
        return distance
    ratio = math.log(distance / single) / math.log(max_distance / single)
    return min(single + int(ratio * (num_buckets - single) + 1e-9), num_buckets - 1)


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(16, 128), (32, 128), (2, 2), (4, 20), (10, 37), (64, 1000)]
)
def test_buckets_follow_the_published_formula(num_buckets: int, max_distance: int) -> None:
    for distance in range(max_distance + 50):
        expected = published_bucket(distance, num_buckets, max_distance)
        assert distance_bucket(distance, num_buckets, max_distance) == expected


def test_buckets_of_t5_by_hand() -> None:
    """The 16 buckets of one direction in every published size."""
    firsts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    found = [distance_bucket(distance, 16, 128) for distance in range(400)]
    assert [found.index(bucket) for bucket in range(16)] == firsts
    assert found == sorted(found)
    assert set(found[128:]) == {15}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sizes", [(32, 128), (8, 20), (4, 3), (12, 50)])
def test_table_equals_hugging_face(sizes: tuple[int, int], bidirectional: bool) -> None:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    num_buckets, max_distance = sizes
    relative = torch.arange(-2 * max_distance, 2 * max_distance + 1)
    expected = modeling.T5Attention._relative_position_bucket(
        relative, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    table = bucket_table(num_buckets, max_distance, bidirectional=bidirectional)
    assert torch.equal(table[relative.clamp(-max_distance, max_distance) + max_distance], expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_terms_equal_a_loop_over_pairs(length: int, bidirectional: bool) -> None:
    bias = RelativeBias(8, 20, 3, bidirectional=bidirectional, std=1.0)
    terms = bias(length, torch.float32)
    assert terms.shape == (1, 3, length, length)
    own = 4 if bidirectional else 8
    for query in range(length):
        for key in range(length):
            bucket = published_bucket(abs(key - query), own, 20)
            if key > query:
                bucket = own + bucket if bidirectional else 0
            assert torch.equal(terms[0, :, query, key], bias.weight[bucket])


def test_gradient_counts_every_pair_once() -> None:
    bias = RelativeBias(8, 20, 2, bidirectional=True, std=1.0)
    weights = torch.randn(1, 2, 30, 30, generator=torch.Generator().manual_seed(0))
    (bias(30, torch.float32) * weights).sum().backward()
    expected = torch.zeros(8, 2)
    for query in range(30):
        for key in range(30):
            bucket = published_bucket(abs(key - query), 4, 20) + 4 * (key > query)
            expected[bucket] += weights[0, :, query, key]
    torch.testing.assert_close(bias.weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_bf16_terms_is_summed_in_fp32() -> None:
    """In bf16 a sum of ones would stop at 256."""
    bias = RelativeBias(4, 3, 1, bidirectional=False, std=1.0)
    terms = bias(600, torch.bfloat16)
    assert terms.dtype == torch.bfloat16
    terms.sum().backward()
    assert bias.weight.grad is not None
    assert float(bias.weight.grad[1]) == 599
    assert float(bias.weight.grad.sum()) == 600 * 600


def test_table_is_no_training_state() -> None:
    bias = RelativeBias(32, 128, 2, bidirectional=True, std=1.0)
    assert list(bias.state_dict()) == ["weight"]


def test_start_values_follow_the_deviation_and_the_generator() -> None:
    drawn = [
        RelativeBias(
            64, 999, 64, bidirectional=True, std=0.3, generator=torch.Generator().manual_seed(n)
        ).weight
        for n in (1, 1, 2)
    ]
    assert drawn[0].std().item() == pytest.approx(0.3, rel=0.05)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
