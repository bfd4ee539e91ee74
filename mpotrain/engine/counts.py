"""What a model counts beside its loss, as metrics: right predictions, order of segments."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def pair_metrics(statistics: Mapping[str, Tensor]) -> dict[str, float]:
    """Return mean loss and accuracy of the order of two segments; {} where no pair was seen.

    Args:
        statistics: sums `pair_loss` (nats), `pair_correct` and `num_pairs` over some batches.
    """
    pairs = float(statistics.get("num_pairs", 0))
    if not pairs:
        return {}
    return {
        "pair_loss": float(statistics["pair_loss"]) / pairs,
        "pair_accuracy": float(statistics["pair_correct"]) / pairs,
    }


def accuracy(statistics: Mapping[str, Tensor], num_tokens: int) -> float | None:
    """Return the share of targets that were predicted right; None where nobody counted them.

    Args:
        statistics: sum `correct` over some batches in evaluation.
        num_tokens: targets of these batches.
    """
    correct = statistics.get("correct")
    return None if correct is None or not num_tokens else float(correct) / num_tokens
