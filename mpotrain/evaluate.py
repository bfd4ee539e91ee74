"""Held-out loss of a model: nats per token, perplexity and bits per byte."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import log
from typing import Any

from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.loader import Loader
from mpotrain.engine.base import Engine


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        split: which documents were read.
        num_sequences: sequences read.
        num_tokens: targets that counted.
        loss: mean cross-entropy, nats per token.
        perplexity: exp(loss).
        bits_per_byte: independent of the vocabulary; None where the bytes are unknown.
    """

    split: str
    num_sequences: int
    num_tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self)


class Evaluator:
    """Evaluates an engine's model on the first sequences of a split, the same for every world."""

    def __init__(
        self,
        engine: Engine,
        dataset: BlendedDataset,
        *,
        micro_batch_size: int,
        num_sequences: int | None,
    ) -> None:
        """Prepare the evaluation.

        Args:
            engine: holds the model.
            dataset: the split.
            micro_batch_size: sequences of one forward pass.
            num_sequences: how many to read; None for the whole split.
        """
        available = dataset.num_samples
        self._engine, self._dataset = engine, dataset
        self._count = available if num_sequences is None else min(num_sequences, available)
        world = engine.world
        self._loader = Loader(
            dataset,
            global_batch_size=micro_batch_size * world.size,
            micro_batch_size=micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            prefetch=False,
        )

    def __call__(self) -> Evaluation:
        """Evaluate; all ranks call this together and get the same result."""
        result = self._engine.evaluate(self._loader.evaluation_batches(self._count))
        per_byte = self._dataset.bytes_per_token
        return Evaluation(
            split=self._dataset.split,
            num_sequences=self._count,
            num_tokens=result.num_tokens,
            loss=result.mean,
            perplexity=result.perplexity,
            bits_per_byte=result.mean / log(2) / per_byte if per_byte else None,
        )
