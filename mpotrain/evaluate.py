"""Held-out loss of a model: nats per token, perplexity, accuracy and bits per byte."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import log
from typing import Any

from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.loader import Loader
from mpotrain.data.objective import open_objective
from mpotrain.engine.base import Engine
from mpotrain.engine.counts import accuracy, pair_metrics
from mpotrain.parallel.watchdog import Beat, beating, no_beat


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        split: which documents were read.
        num_sequences: sequences read.
        num_tokens: targets that counted.
        loss: mean cross-entropy, nats per token.
        perplexity: exp(loss).
        bits_per_byte: independent of the vocabulary; None where the bytes are unknown or where not
            every token is predicted from those before it.
        accuracy: share of the targets with the highest score; None where it was not counted.
        pair_loss: mean cross-entropy of the order of two segments (nats); None without pairs.
        pair_accuracy: share of the pairs whose order was found.
    """

    split: str
    num_sequences: int
    num_tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    accuracy: float | None = None
    pair_loss: float | None = None
    pair_accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data; numbers of pairs only where there are any."""
        values = asdict(self)
        pairs = ("pair_loss", "pair_accuracy")
        return {k: v for k, v in values.items() if k not in pairs or v is not None}

    def describe(self) -> str:
        """Return the result as a line of text."""
        facts = [f"loss {self.loss:.4f} nats/token", f"perplexity {self.perplexity:.2f}"]
        if self.bits_per_byte is not None:
            facts.append(f"{self.bits_per_byte:.4f} bits/byte")
        if self.accuracy is not None:
            facts.append(f"accuracy {100 * self.accuracy:.2f} %")
        if self.pair_accuracy is not None:
            facts.append(
                f"order of segments: loss {self.pair_loss:.4f}, "
                f"accuracy {100 * self.pair_accuracy:.2f} %"
            )
        read = f"{self.num_sequences:,} sequences, {self.num_tokens:,} targets"
        return f"{self.split}: {', '.join(facts)} ({read})"


class Evaluator:
    """Evaluates an engine's model on the first sequences of a split, the same for every world."""

    def __init__(
        self,
        engine: Engine,
        dataset: BlendedDataset,
        *,
        micro_batch_size: int,
        num_sequences: int | None,
        beat: Beat = no_beat,
    ) -> None:
        """Prepare the evaluation.

        Args:
            engine: holds the model.
            dataset: the split.
            micro_batch_size: sequences of one forward pass.
            num_sequences: how many to read; None for the whole split.
            beat: told of every batch.
        """
        available = dataset.num_samples
        self._engine, self._dataset, self._beat = engine, dataset, beat
        self._is_causal = dataset.data.objective.kind == "causal"
        self._count = available if num_sequences is None else min(num_sequences, available)
        world = engine.world
        self._loader = Loader(
            dataset,
            objective=open_objective(dataset),
            global_batch_size=micro_batch_size * world.data_size,
            micro_batch_size=micro_batch_size,
            rank=world.data_rank,
            world_size=world.data_size,
            prefetch=False,
        )

    def __call__(self) -> Evaluation:
        """Evaluate; all ranks call this together and get the same result."""
        batches = self._loader.evaluation_batches(self._count)
        result = self._engine.evaluate(beating(batches, self._beat, "evaluating"))
        # Bits per byte mean something where the loss is that of the whole text.
        per_byte = self._dataset.bytes_per_token if self._is_causal else None
        pairs = pair_metrics(result.statistics)
        return Evaluation(
            split=self._dataset.split,
            num_sequences=self._count,
            num_tokens=result.num_tokens,
            loss=result.mean,
            perplexity=result.perplexity,
            bits_per_byte=result.mean / log(2) / per_byte if per_byte else None,
            accuracy=accuracy(result.statistics, result.num_tokens),
            pair_loss=pairs.get("pair_loss"),
            pair_accuracy=pairs.get("pair_accuracy"),
        )
