"""Multi-head attention on PyTorch's fused kernels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Return the attention of projected queries to projected keys and values.

    Args:
        query: (B, T, heads x head size).
        key: (B, S, heads x head size).
        value: (B, S, heads x head size).
        num_heads: number of heads.
        mask: what a query sees: bool (True = seen) or a term added to the scores in the dtype of
            `query`; broadcasts to (B, heads, T, S).
        dropout: rate at which probabilities are dropped; 0 in evaluation.
        scale: factor on the scores; None = 1 / sqrt(head size).
        is_causal: position t sees positions up to t; excludes `mask`.

    Returns:
        (B, T, heads x head size).
    """
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (query, key, value))
    mixed = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    )
    return mixed.transpose(1, 2).flatten(2)


def document_mask(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Return which keys a query sees where rows hold several documents: its own document's.

    Padding (0) is a document like any other: it sees itself alone, so no row is without a key.

    Args:
        query_ids: documents of the queries (B, T).
        key_ids: documents of the keys (B, S).

    Returns:
        bool (B, 1, T, S).
    """
    return (query_ids[:, :, None] == key_ids[:, None, :])[:, None]


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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, T, H) to (B, T, H).

        Args:
            x: the sequences.
            mask: bool (B, 1, T, T), True where position t sees position s; None = all s <= t.
        """
        batch, length, hidden = x.shape
        heads = (batch, length, 3, self.num_heads, hidden // self.num_heads)
        query, key, value = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
        )
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return result
