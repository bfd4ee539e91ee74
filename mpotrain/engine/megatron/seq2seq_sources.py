"""What the layers of a T5 are made of: logical names, operators and cuts of both stacks."""

from __future__ import annotations

from mpotrain.engine.megatron.feature_cuts import FeaturePeriods
from mpotrain.engine.megatron.slots import Slots
from mpotrain.engine.megatron.sources import (
    AttentionSource,
    FeedForwardSource,
    LayerSource,
    LinearSource,
    MixtureSource,
    NormSource,
)
from mpotrain.models.t5_config import MODULES, T5Config
from mpotrain.tensor.cached import StepCache


class T5Sources:
    """Sources of the layers of encoder and decoder.

    Scores are not scaled (queries start smaller instead), nothing has a bias vector, norms divide
    by the root mean square, and dropout follows the ReLU inside a feed-forward layer.

    Attributes:
        model: the network.
        slots: makes the parameters.
        periods: how the features between two layers are shared out over the ranks.
    """

    def __init__(
        self,
        model: T5Config,
        slots: Slots,
        periods: FeaturePeriods,
        *,
        cache: StepCache | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: the network.
            slots: makes the parameters.
            periods: how the features between two layers are shared out over the ranks.
            cache: of the rebuilt matrices of a step; None = every pass rebuilds them.
        """
        self.model, self.slots, self.periods = model, slots, periods
        self._cache = cache
        self._sites = {site.name: site for site in model.all_sites()}

    def layers(self, stack: str) -> list[LayerSource]:
        """Return the layers of a stack, from first to last.

        Args:
            stack: "encoder" or "decoder".
        """
        depth = self.model.stacks[stack]
        return [self._layer(f"{stack}.blocks.{n}", stack == "decoder") for n in range(depth)]

    def norm(self, name: str) -> NormSource:
        """Return a normalisation.

        Args:
            name: logical name of the module.
        """
        return NormSource(self.slots, f"{name}.weight", None, self.model.norm_eps)

    def _layer(self, prefix: str, is_decoder: bool) -> LayerSource:
        cross, norm_cross = None, None
        if is_decoder:
            cross = self._attention(f"{prefix}.cross_attention", causal=False)
            norm_cross = self.norm(f"{prefix}.norm_cross")
        return LayerSource(
            attention=self._attention(f"{prefix}.attention", causal=is_decoder),
            norm_1=self.norm(f"{prefix}.norm_1"),
            norm_2=self.norm(f"{prefix}.norm_2"),
            ffn=self._feed_forward(f"{prefix}.ffn"),
            cross_attention=cross,
            norm_cross=norm_cross,
            recompute=self.model.activation_checkpointing,
        )

    def _attention(self, name: str, *, causal: bool) -> AttentionSource:
        period = self.periods.attention
        query, key, value, out = (
            self._linear(f"{name}.{module}", period) for module in MODULES.values()
        )
        return AttentionSource((query, key, value), out, causal, scale=1.0)

    def _feed_forward(self, name: str) -> FeedForwardSource | MixtureSource:
        moe, router = self.model.moe, self._sites.get(f"{name}.router")
        if moe is None or router is None:
            first, second = (
                self._linear(f"{name}.{leaf}", self.periods.ffn) for leaf in ("c_fc", "c_proj")
            )
            return FeedForwardSource(first, second, "relu", self.model.dropout)
        c_fc, c_proj = self._sites[f"{name}.c_fc"], self._sites[f"{name}.c_proj"]
        return MixtureSource(
            self.slots, name, moe, router, c_fc, c_proj, self.periods.expert, "relu"
        )

    def _linear(self, name: str, period: int) -> LinearSource:
        return LinearSource(self.slots, self._sites[name], period, cache=self._cache)
