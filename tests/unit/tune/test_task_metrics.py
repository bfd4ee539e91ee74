"""Metrics from sums, against formulas that see every example."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mpotrain.tune.glue_metrics import (
    accuracy,
    class_metrics,
    f1,
    matthews,
    mean_ranks,
    pearson,
    spearman,
    value_metrics,
)

RNG = np.random.default_rng(3)


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    table = np.zeros((classes, classes))
    for a, b in zip(true, predicted, strict=True):
        table[a, b] += 1
    return table


def moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_class_metrics_equal_those_over_single_examples(classes: int) -> None:
    for _ in range(20):
        true = RNG.integers(0, classes, 60)
        predicted = np.where(RNG.random(60) < 0.5, true, RNG.integers(0, classes, 60))
        table = confusion(true, predicted, classes)
        assert accuracy(table) == pytest.approx(np.mean(true == predicted))
        # R_K is the correlation of one-hot matrices, taken over all entries by class.
        t, p = np.eye(classes)[true], np.eye(classes)[predicted]
        t, p = t - t.mean(0), p - p.mean(0)
        expected = (t * p).sum() / math.sqrt((t * t).sum() * (p * p).sum())
        assert matthews(table) == pytest.approx(expected, abs=1e-12)
        if classes == 2:
            assert matthews(table) == pytest.approx(stats.pearsonr(true, predicted)[0])
            precision = np.mean(true[predicted == 1])
            recall = np.mean(predicted[true == 1])
            assert f1(table) == pytest.approx(2 * precision * recall / (precision + recall))


def test_f1_and_matthews_by_hand() -> None:
    table = np.array([[50.0, 10.0], [5.0, 35.0]])
    assert accuracy(table) == 0.85
    assert f1(table) == pytest.approx(70 / 85)
    assert matthews(table) == pytest.approx((50 * 35 - 10 * 5) / math.sqrt(45 * 40 * 55 * 60))


def test_one_class_alone_gives_zero_and_no_division_by_zero() -> None:
    for table in ([[4, 0], [3, 0]], [[4, 3], [0, 0]], [[7, 0], [0, 0]]):
        assert matthews(np.array(table, dtype=float)) == 0.0
        assert f1(np.array(table, dtype=float)) == 0.0
    assert f1(np.array([[0.0, 0.0], [0.0, 3.0]])) == 1.0


def test_pearson_and_spearman_against_scipy() -> None:
    for scale, shift in itertools.product((1e-3, 1.0, 100.0), (0.0, 3.0)):
        y = RNG.integers(0, 6, 200) / 1.0
        x = scale * (y + RNG.normal(size=200)) + shift
        assert pearson(moments(x, y), 200) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)


def test_constants_have_no_correlation() -> None:
    x, y = np.full(10, 2.5), np.arange(10.0)
    assert pearson(moments(x, y), 10) == 0.0
    assert spearman(x, y) == 0.0


def test_equal_numbers_share_their_mean_rank() -> None:
    numbers = np.array([3.0, 1.0, 3.0, 2.0])
    assert (mean_ranks(numbers) + 2.5).tolist() == stats.rankdata(numbers).tolist()


def test_metrics_come_in_the_order_that_is_asked_for() -> None:
    table = np.eye(2)
    assert list(class_metrics(table, ("matthews", "accuracy"))) == ["matthews", "accuracy"]
    x = np.arange(5.0)
    found = value_metrics(moments(x, x), x, x, ("pearson", "spearman"))
    assert found == pytest.approx({"pearson": 1.0, "spearman": 1.0})
