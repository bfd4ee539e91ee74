"""Metrics made of what a model counts beside its loss."""

import pytest
import torch

from mpotrain.engine.counts import accuracy, pair_metrics


def sums(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_pair_metrics_are_means_over_pairs() -> None:
    found = pair_metrics(sums(pair_loss=3.0, pair_correct=5, num_pairs=8, correct=100))
    assert found == {"pair_loss": 0.375, "pair_accuracy": 0.625}


@pytest.mark.parametrize(
    "given", [{}, sums(correct=3), sums(pair_loss=0.0, pair_correct=0, num_pairs=0)]
)
def test_there_are_no_pair_metrics_without_pairs(given: dict[str, torch.Tensor]) -> None:
    assert pair_metrics(given) == {}


def test_accuracy_is_a_share_of_all_targets() -> None:
    assert accuracy(sums(correct=3), 12) == 0.25
    assert accuracy(sums(correct=0), 12) == 0.0


def test_accuracy_is_unknown_where_nothing_was_counted() -> None:
    assert accuracy({}, 12) is None
    assert accuracy(sums(pair_correct=3, num_pairs=4), 12) is None
    assert accuracy(sums(correct=0), 0) is None
