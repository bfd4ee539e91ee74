"""Pre-norm transformer block and its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.norm import LayerNorm

AUXILIARY_LOSS = "auxiliary_loss"
"""Name under which a block returns the auxiliary loss of its mixture."""


class FeedForward(nn.Module):
    """Two linear layers around a GELU (tanh approximation, as GPT-2)."""

    def __init__(self, c_fc: nn.Module, c_proj: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, H) to (B, T, H)."""
        result: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return result


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`.

    Attributes:
        ffn: a plain feed-forward layer, or a mixture of experts.
    """

    def __init__(
        self, attention: nn.Module, ffn: nn.Module, *, hidden_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(hidden_size)
        self.attention = attention
        self.norm_2 = LayerNorm(hidden_size)
        self.ffn = ffn
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Map x (B, T, H) to (B, T, H).

        Args:
            x: the sequences.
            mask: what each position sees, bool (B, 1, T, T); None = all positions up to it.

        Returns:
            The result and, where the block has a mixture, its statistics by name together with its
            auxiliary loss; both as plain containers, into which activation checkpointing and the
            hooks of sharded weights can look.
        """
        x = x + self._drop(self.attention(self.norm_1(x), mask))
        normalised = self.norm_2(x)
        if not isinstance(self.ffn, MixtureOfExperts):
            return x + self._drop(self.ffn(normalised)), {}
        y, loss, statistics = self.ffn(normalised)
        return x + self._drop(y), {**statistics, AUXILIARY_LOSS: loss}

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


def stack_mixtures(mixtures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the statistics of all mixtures by name, stacked in block order; {} without any.

    Args:
        mixtures: what each mixture returns, its auxiliary loss under `AUXILIARY_LOSS` included.
    """
    names = [name for name in mixtures[0] if name != AUXILIARY_LOSS] if mixtures else []
    return {name: torch.stack([told[name] for told in mixtures]) for name in names}
