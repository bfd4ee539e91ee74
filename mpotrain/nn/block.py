"""Pre-norm transformer block and its parts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from mpotrain.nn.moe.mixture import MixtureOfExperts

AUXILIARY_LOSS = "auxiliary_loss"
"""Name under which a block returns the auxiliary loss of its mixture."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in fp32 whatever the dtype of x and of the parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., H); the result has the dtype of x."""
        weight, bias = self.weight.float(), self.bias.float()
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(
            x.dtype
        )


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

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Map x (B, T, H) to (B, T, H).

        Returns:
            The result and, where the block has a mixture, its statistics by name together with its
            auxiliary loss; both as plain containers, into which activation checkpointing and the
            hooks of sharded weights can look.
        """
        x = x + self._drop(self.attention(self.norm_1(x)))
        normalised = self.norm_2(x)
        if not isinstance(self.ffn, MixtureOfExperts):
            return x + self._drop(self.ffn(normalised)), {}
        y, loss, statistics = self.ffn(normalised)
        return x + self._drop(y), {**statistics, AUXILIARY_LOSS: loss}

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)
