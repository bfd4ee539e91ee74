"""Lengths under span corruption: how many tokens are dropped from a window, and what is left.

Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer"
(JMLR 2020), section 3.1.4; the arithmetic is that of `random_spans_helper` in the published T5
code, so that every row of a run has the same lengths and none needs padding. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST = 3
"""Encoder tokens of the shortest row: one token that stays, one sentinel, the end."""


@dataclass(frozen=True)
class SpanLengths:
    """A window of text and the two sequences that it becomes.

    Attributes:
        window: tokens of the stream in one sample.
        num_noise: how many of them are dropped.
        num_spans: in how many spans.
    """

    window: int
    num_noise: int
    num_spans: int

    @property
    def num_kept(self) -> int:
        """Tokens of the window that the encoder reads."""
        return self.window - self.num_noise

    @property
    def encoder(self) -> int:
        """Tokens of the encoder: what is kept, a sentinel for each span, the end."""
        return self.num_kept + self.num_spans + 1

    @property
    def decoder(self) -> int:
        """Targets: what is dropped, a sentinel before each span, the end."""
        return self.num_noise + self.num_spans + 1


def corrupted(window: int, rate: float, mean_span: float) -> SpanLengths:
    """Return how a window of so many tokens is corrupted (`random_spans_noise_mask`).

    Args:
        window: tokens, at least 2.
        rate: share of tokens to drop, between 0 and 1.
        mean_span: mean length of a span, at least 1.
    """
    num_noise = min(max(round(window * rate), 1), window - 1)
    return SpanLengths(window, num_noise, max(round(num_noise / mean_span), 1))


def span_lengths(encoder: int, rate: float, mean_span: float) -> SpanLengths:
    """Return the longest window whose encoder sequence has exactly the wanted length.

    One token more in the window makes the encoder sequence longer by one or by nothing, so every
    length from `SHORTEST` on is reached. T5: 512, 0.15, 3.0 give a window of 568 and 114 targets.

    Args:
        encoder: tokens that the encoder reads, sentinels and the end included.
        rate: share of tokens to drop, between 0 and 1.
        mean_span: mean length of a span, at least 1.

    Raises:
        ValueError: shorter than `SHORTEST`, or rate and mean out of range.
    """
    if encoder < SHORTEST or not 0 < rate < 1 or not mean_span >= 1:
        raise ValueError(f"no window for {encoder} tokens at rate {rate}, spans of {mean_span}")
    low, high = 2, 4
    while corrupted(high, rate, mean_span).encoder <= encoder:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if corrupted(middle, rate, mean_span).encoder <= encoder:
            low = middle
        else:
            high = middle
    return corrupted(low, rate, mean_span)
