"""How samples are cut from the stream of tokens, and the share of them to predict (no torch)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """What one sample takes from the stream of tokens.

    Attributes:
        stride: tokens from the beginning of one sample to that of the next.
        overlap: tokens that a sample shares with the next one.
    """

    stride: int
    overlap: int = 0

    @property
    def length(self) -> int:
        """Tokens of one sample."""
        return self.stride + self.overlap


def rate_problems(where: str, rate: float) -> list[str]:
    """Return what is wrong with a share of tokens to predict, under the key `where`.rate."""
    return [] if 0 < rate < 1 else [f"{where}.rate: is {rate} but must lie between 0 and 1"]
