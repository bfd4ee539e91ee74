"""Metrics of GLUE from sums over examples, so that they are the same for every world.

A confusion matrix N has the true classes as rows: N[a, b] examples of class a were taken for b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mpotrain.tune.tasks import Metric

Floats = npt.NDArray[np.float64]


def accuracy(confusion: Floats) -> float:
    """Return the share of right predictions; confusion (C, C)."""
    return float(np.trace(confusion) / confusion.sum())


def f1(confusion: Floats) -> float:
    """Return F1 of class 1 of two, 2 TP / (2 TP + FP + FN); 0 where nothing is or should be 1."""
    hits, errors = confusion[1, 1], confusion[0, 1] + confusion[1, 0]
    return float(2 * hits / (2 * hits + errors)) if hits or errors else 0.0


def matthews(confusion: Floats) -> float:
    """Return the correlation of true and predicted classes.

    With two classes it is Matthews' coefficient (1975), with more Gorodkin's R_K (2004). It is 0
    where all examples, or all predictions, are of one class.
    """
    total = confusion.sum()
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    covariance = np.trace(confusion) * total - true @ predicted
    variances = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(covariance / math.sqrt(variances)) if variances > 0 else 0.0


def pearson(moments: Floats, num_examples: int) -> float:
    """Return the linear correlation of predictions x and values y; 0 where one is constant.

    Args:
        moments: sums of x, y, x^2, y^2 and xy over all examples, (5,).
        num_examples: how many there are.
    """
    x, y, xx, yy, xy = (float(value) / num_examples for value in moments)
    variances = max(xx - x * x, 0.0) * max(yy - y * y, 0.0)
    return (xy - x * y) / math.sqrt(variances) if variances > 0 else 0.0


def spearman(predictions: Floats, values: Floats) -> float:
    """Return the linear correlation of the ranks of x and y; equal numbers share their mean rank.

    Args:
        predictions: x of every example, (N,).
        values: y of every example, (N,).
    """
    x, y = mean_ranks(predictions), mean_ranks(values)
    moments = np.array([x.sum(), y.sum(), x @ x, y @ y, x @ y])
    return pearson(moments, len(x))


def mean_ranks(numbers: Floats) -> Floats:
    """Return the rank of each number around 0, the mean one among equals, (N,)."""
    _, place, count = np.unique(numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: Floats = (last - (count - 1) / 2)[place] - (len(numbers) + 1) / 2
    return ranks


def class_metrics(confusion: Floats, wanted: Sequence[Metric]) -> dict[str, float]:
    """Return the metrics of a classification by name.

    Args:
        confusion: sums over all examples, (C, C).
        wanted: which ones, in this order.
    """
    known = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
    return {name: known[name](confusion) for name in wanted}


def value_metrics(
    moments: Floats, predictions: Floats, values: Floats, wanted: Sequence[Metric]
) -> dict[str, float]:
    """Return the metrics of a regression by name.

    Args:
        moments: see `pearson`.
        predictions: of every example, (N,).
        values: of every example, (N,).
        wanted: which ones, in this order.
    """
    found = {
        "pearson": pearson(moments, len(values)),
        "spearman": spearman(predictions, values),
    }
    return {name: found[name] for name in wanted}
