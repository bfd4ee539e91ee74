"""Pre-norm transformer block and its parts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


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
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`."""

    def __init__(
        self, attention: nn.Module, ffn: nn.Module, *, hidden_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(hidden_size)
        self.attention = attention
        self.norm_2 = LayerNorm(hidden_size)
        self.ffn = ffn
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, H) to (B, T, H)."""
        x = x + self._drop(self.attention(self.norm_1(x)))
        return x + self._drop(self.ffn(self.norm_2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)
