"""A layer of an encoder, with weights of its own or given from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional

from mpotrain.nn.activation import ActivationName, activation
from mpotrain.nn.attention import attend
from mpotrain.nn.norm import LayerNorm, layer_norm
from mpotrain.nn.sharing import LayerLinear, Parts, project
from mpotrain.nn.sharing_config import ATTENTION_FAMILIES

Given = dict[str, Parts]
"""What a layer is given from outside, by family of matrices or name of a norm."""
FEED_FORWARD_FAMILIES = ("c_fc", "c_proj")


class SelfAttention(nn.Module):
    """Self-attention in both directions.

    Attributes:
        query: layer (H -> H).
        key: layer (H -> H).
        value: layer (H -> H).
        out: layer (H -> H).
    """

    def __init__(
        self, layers: Mapping[str, LayerLinear], *, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = layers["query"], layers["key"], layers["value"]
        self.out = layers["attention_out"]
        self.num_heads, self.dropout = num_heads, dropout

    def forward(self, x: Tensor, mask: Tensor | None, given: Given) -> Tensor:
        """Map x (B, T, H) to (B, T, H).

        Args:
            x: the sequences.
            mask: bool (B, 1, T, T), True where position t sees position s; None = everywhere.
            given: shared weights and adapters of the four matrices.
        """
        mixed = attend(
            project(self.query, x, given.get("query", {})),
            project(self.key, x, given.get("key", {})),
            project(self.value, x, given.get("value", {})),
            num_heads=self.num_heads,
            mask=mask,
            dropout=self.dropout if self.training else 0.0,
        )
        return project(self.out, mixed, given.get("attention_out", {}))


class EncoderFeedForward(nn.Module):
    """Two linear layers around an activation."""

    def __init__(
        self, layers: Mapping[str, LayerLinear], between: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.between = layers["c_fc"], layers["c_proj"], between

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """Map x (B, T, H) to (B, T, H); `given` as in `SelfAttention.forward`."""
        hidden = self.between(project(self.c_fc, x, given.get("c_fc", {})))
        return project(self.c_proj, hidden, given.get("c_proj", {}))


class EncoderBlock(nn.Module):
    """`norm(a x + f(x))` for f attention, then feed-forward; or `x + f(norm(x))`.

    Attributes:
        attention_norm: norm of the attention part; None where it is given from outside.
        ffn_norm: norm of the feed-forward part; None likewise.
        residual_scale: a, above 1 for DeepNorm (Wang et al. 2022, arXiv 2203.00555).
    """

    def __init__(
        self,
        layers: Mapping[str, LayerLinear],
        *,
        hidden_size: int,
        num_heads: int,
        activation_name: ActivationName,
        is_post_norm: bool,
        owns_norms: bool,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
        residual_scale: float = 1.0,
    ) -> None:
        """Join the matrices of a layer.

        Args:
            layers: the six matrices by family.
            hidden_size: H.
            num_heads: attention heads.
            activation_name: between the feed-forward matrices.
            is_post_norm: normalise after the residual sum, not before each part.
            owns_norms: whether the norms are the layer's own.
            norm_eps: added to the variance.
            dropout: rate after attention and feed-forward output.
            attention_dropout: rate of attention probabilities.
            residual_scale: factor on the residual stream in post-norm sums.
        """
        super().__init__()
        self.attention = SelfAttention(layers, num_heads=num_heads, dropout=attention_dropout)
        self.ffn = EncoderFeedForward(layers, activation(activation_name))
        self.attention_norm = LayerNorm(hidden_size, eps=norm_eps) if owns_norms else None
        self.ffn_norm = LayerNorm(hidden_size, eps=norm_eps) if owns_norms else None
        self.is_post_norm, self.norm_eps = is_post_norm, norm_eps
        self.dropout, self.residual_scale = dropout, residual_scale

    def forward(self, x: Tensor, mask: Tensor | None, given: Given) -> Tensor:
        """Map x (B, T, H) to (B, T, H).

        Args:
            x: the sequences.
            mask: bool (B, 1, T, T), True where position t sees position s; None = everywhere.
            given: shared weights and adapters by family; weights of shared norms by name.
        """
        attention_given = _only(given, ATTENTION_FAMILIES)
        ffn_given = _only(given, FEED_FORWARD_FAMILIES)
        attention_weights, ffn_weights = given.get("attention_norm"), given.get("ffn_norm")
        if self.is_post_norm:
            x = self._join(x, self.attention(x, mask, attention_given))
            x = self._normalise(self.attention_norm, x, attention_weights)
            x = self._join(x, self.ffn(x, ffn_given))
            return self._normalise(self.ffn_norm, x, ffn_weights)
        normalised = self._normalise(self.attention_norm, x, attention_weights)
        x = self._join(x, self.attention(normalised, mask, attention_given))
        normalised = self._normalise(self.ffn_norm, x, ffn_weights)
        return self._join(x, self.ffn(normalised, ffn_given))

    def _join(self, x: Tensor, y: Tensor) -> Tensor:
        kept = x if self.residual_scale == 1.0 else self.residual_scale * x
        return kept + functional.dropout(y, self.dropout, self.training)

    def _normalise(self, norm: LayerNorm | None, x: Tensor, weights: Parts | None) -> Tensor:
        if weights is not None:
            return layer_norm(x, weights["weight"], weights["bias"], self.norm_eps)
        if norm is None:
            raise ValueError("the layer owns no norms, and none are given")
        result: Tensor = norm(x)
        return result


def _only(given: Given, families: tuple[str, ...]) -> Given:
    # Copies: DeepSpeed's hooks put other tensors into the containers that a module is called with.
    return {family: dict(given[family]) for family in families if family in given}
