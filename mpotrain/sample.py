"""How long a training sample is, seen by each part of a network (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stream = Literal["inputs", "targets", "predicted", "pairs"]
"""Which rows of a sample meet a weight matrix; the names are those of `SampleLengths`."""


@dataclass(frozen=True)
class SampleLengths:
    """Rows of one sample by what they are.

    Attributes:
        inputs: tokens that the network reads: T of a decoder-only network or an encoder, S of the
            encoder of a sequence-to-sequence network.
        targets: tokens of the decoder: T again where there is no second sequence.
        predicted: targets that count in the loss (masked tokens, or all).
        pairs: sequences that are classified as a whole.
    """

    inputs: int
    targets: int
    predicted: int
    pairs: int = 1

    def of(self, stream: Stream) -> int:
        """Return the number of rows of a stream."""
        count: int = getattr(self, stream)
        return count


def causal_lengths(sequence_length: int) -> SampleLengths:
    """Return the lengths where every token is read and every next token is predicted."""
    return SampleLengths(sequence_length, sequence_length, sequence_length)
