"""Causal multi-head self-attention on PyTorch's fused kernels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class CausalSelfAttention(nn.Module):
    """Self-attention in which position t sees positions up to t.

    Attributes:
        qkv: layer (H -> 3 H): queries, keys, values, in this order.
        out: layer (H -> H).
    """

    def __init__(self, qkv: nn.Module, out: nn.Module, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.qkv, self.out = qkv, out
        self.num_heads, self.dropout = num_heads, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, H) to (B, T, H)."""
        batch, length, hidden = x.shape
        heads = (batch, length, 3, self.num_heads, hidden // self.num_heads)
        query, key, value = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return result
