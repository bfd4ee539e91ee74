"""Blocks of T5: pre-norm with RMS normalisation, no biases, attention with unscaled scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.nn.attention import attend
from mpotrain.nn.block import AUXILIARY_LOSS
from mpotrain.nn.moe.mixture import MixtureOfExperts


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` times a weight, in fp32 whatever the dtype of x.

    Attributes:
        weight: parameter (H,).
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., H); the result has the dtype of x."""
        weight = self.weight.float()
        return functional.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class T5Attention(nn.Module):
    """Attention of a sequence to itself or to another; its scores are not divided by anything.

    Attributes:
        query: layer (H -> heads x head size).
        key: likewise.
        value: likewise.
        out: layer (heads x head size -> H).
    """

    def __init__(
        self,
        query: nn.Module,
        key: nn.Module,
        value: nn.Module,
        out: nn.Module,
        *,
        num_heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = query, key, value, out
        self.num_heads, self.dropout = num_heads, dropout

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Map x (B, T, H) to (B, T, H).

        Args:
            x: where queries come from.
            memory: where keys and values come from (B, S, H); x itself in self-attention.
            mask: term added to the scores, broadcasts to (B, heads, T, S).
        """
        mixed = attend(
            self.query(x),
            self.key(memory),
            self.value(memory),
            num_heads=self.num_heads,
            mask=mask,
            dropout=self.dropout if self.training else 0.0,
            scale=1.0,
        )
        result: Tensor = self.out(mixed)
        return result


class T5FeedForward(nn.Module):
    """Two linear layers around ReLU and dropout."""

    def __init__(self, c_fc: nn.Module, c_proj: nn.Module, *, dropout: float) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.dropout = c_fc, c_proj, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, H) to (B, T, H)."""
        inner = functional.dropout(functional.relu(self.c_fc(x)), self.dropout, self.training)
        result: Tensor = self.c_proj(inner)
        return result


class T5Block(nn.Module):
    """Self-attention, in a decoder attention to the encoder, then a feed-forward layer.

    Each works on the normalised residual stream and is added to it. Inside a mixture of experts
    nothing is dropped: its rows lie in an order that depends on the layout of ranks.

    Attributes:
        attention: of the sequence to itself.
        cross_attention: of the sequence to what the encoder returns; None in an encoder.
        ffn: a plain feed-forward layer, or a mixture of experts.
    """

    def __init__(
        self,
        attention: T5Attention,
        cross_attention: T5Attention | None,
        ffn: T5FeedForward | MixtureOfExperts,
        *,
        hidden_size: int,
        eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(hidden_size, eps)
        self.attention = attention
        self.norm_cross = None if cross_attention is None else RMSNorm(hidden_size, eps)
        self.cross_attention = cross_attention
        self.norm_2 = RMSNorm(hidden_size, eps)
        self.ffn = ffn
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Map x (B, T, H) to (B, T, H).

        Args:
            x: the sequences.
            mask: term of the scores of self-attention, broadcasts to (B, heads, T, T).
            memory: what the encoder returns (B, S, H); a decoder needs it.
            memory_mask: term of the scores of cross-attention, broadcasts to (B, heads, T, S);
                None = every position sees the whole memory.

        Returns:
            The result and, where the block has a mixture, its statistics by name together with its
            auxiliary loss; both as plain containers, into which activation checkpointing and the
            hooks of sharded weights can look.
        """
        normalised = self.norm_1(x)
        x = x + self._drop(self.attention(normalised, normalised, mask))
        if self.cross_attention is not None and self.norm_cross is not None:
            x = x + self._drop(self.cross_attention(self.norm_cross(x), memory, memory_mask))
        normalised = self.norm_2(x)
        if not isinstance(self.ffn, MixtureOfExperts):
            return x + self._drop(self.ffn(normalised)), {}
        y, loss, statistics = self.ffn(normalised)
        return x + self._drop(y), {**statistics, AUXILIARY_LOSS: loss}

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)
