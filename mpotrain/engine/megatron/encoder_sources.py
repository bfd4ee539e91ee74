"""Where the layers of an encoder find their tensors: the same names as in the local network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mpotrain.engine.megatron.copies import names_of_several
from mpotrain.engine.megatron.feature_cuts import FeaturePeriods
from mpotrain.engine.megatron.holdings import layer_names
from mpotrain.engine.megatron.slots import Slots
from mpotrain.engine.megatron.sources import (
    AttentionSource,
    FeedForwardSource,
    LayerSource,
    LinearSource,
    NormSource,
)
from mpotrain.models.encoder_config import MODULES, EncoderConfig
from mpotrain.models.sites import Site
from mpotrain.nn.encoder_block import FEED_FORWARD_FAMILIES
from mpotrain.nn.sharing_config import ATTENTION_FAMILIES
from mpotrain.tensor.cached import StepCache

EMBEDDING_STEMS = (
    "token_embedding",
    "position_embedding",
    "type_embedding",
    "embedding_norm",
    "embedding_map",
)
"""Modules and tables in front of the layers."""
HEAD_STEMS = ("token_embedding", "final_norm", "pooler", "pair_head", "mlm_head")
"""Modules behind the layers; tokens are predicted by the matrix that embeds them."""


def layer_source(
    config: EncoderConfig,
    layer: int,
    slots: Slots,
    periods: FeaturePeriods,
    cache: StepCache | None = None,
) -> LayerSource:
    """Return the source of one layer.

    Args:
        config: of the encoder.
        layer: its number, from 0 over the whole network.
        slots: of the chunk.
        periods: how features are cut.
        cache: of the rebuilt matrices of a step.
    """
    sites = {site.name: site for site in config.all_sites()}
    place = _Place(config, layer, slots, sites)
    attention = [place.linear(f, periods.attention, cache) for f in ATTENTION_FAMILIES]
    c_fc, c_proj = (place.linear(f, periods.ffn, cache) for f in FEED_FORWARD_FAMILIES)
    return LayerSource(
        attention=AttentionSource(tuple(attention[:3]), attention[3], causal=False),
        norm_1=place.norm("attention_norm"),
        norm_2=place.norm("ffn_norm"),
        ffn=FeedForwardSource(c_fc, c_proj, config.activation),
        is_post_norm=config.norm == "post",
        residual_scale=float(2 * config.num_layers) ** 0.25 if config.start.deepnorm else 1.0,
        recompute=config.activation_checkpointing,
    )


@dataclass(frozen=True)
class _Place:
    """One layer: which tensors it owns, and which it uses with others."""

    config: EncoderConfig
    layer: int
    slots: Slots
    sites: Mapping[str, Site]

    @property
    def block(self) -> str:
        return f"blocks.{self.config.block(self.layer)}"

    @property
    def tied(self) -> str:
        return f"tied.{self.config.group(self.layer)}"

    def linear(self, family: str, period: int, cache: StepCache | None) -> LinearSource:
        site = self.sites[f"{self.block}.{MODULES[family]}"]
        bias = f"{site.name}.bias" if site.bias else None
        if self.config.ties_vectors() and getattr(self.config.sites, family).bias:
            bias = f"{self.tied}.{family}_bias"
        adapter = None
        if self.config.adapter is not None and family in self.config.adapter.families:
            stem = f"adapters.{self.layer}.{family}"
            adapter = (f"{stem}.u", f"{stem}.d")
        return LinearSource(
            self.slots, site, period, bias, central=site.bank, adapter=adapter, cache=cache
        )

    def norm(self, name: str) -> NormSource:
        stem = f"{self.tied}.{name}_" if self.config.ties_vectors() else f"{self.block}.{name}."
        return NormSource(self.slots, f"{stem}weight", f"{stem}bias", self.config.norm_eps)


def shared_names(config: EncoderConfig) -> frozenset[str]:
    """Return the logical names of all tensors that more than one place of the network uses.

    These are what layers share, and the matrix that embeds and predicts tokens.
    """
    names = {info.name for info in config.parameters()}
    layers = (layer_names(config, layer, names) for layer in range(config.num_layers))
    return names_of_several([_under(EMBEDDING_STEMS, names), *layers, _under(HEAD_STEMS, names)])


def _under(stems: Collection[str], names: Collection[str]) -> set[str]:
    """Return the names that are one of the stems or begin with one and a dot."""
    heads = tuple(f"{stem}." for stem in stems)
    return {name for name in names if name in stems or name.startswith(heads)}
