"""Layers of GPT-2 as sources: which logical tensors each of them is made of."""

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
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.models.sites import Site
from mpotrain.tensor.cached import StepCache

NORM_EPS = 1e-5


def gpt2_layer(
    config: GPT2Config,
    layer: int,
    slots: Slots,
    periods: FeaturePeriods,
    cache: StepCache | None = None,
) -> LayerSource:
    """Return the source of one layer.

    Args:
        config: of the network.
        layer: its number, from 0.
        slots: of the chunk.
        periods: how features are cut.
        cache: of the rebuilt matrices of a step.
    """
    sites = {site.name: site for site in config.all_sites()}
    prefix = f"blocks.{layer}"

    def linear(name: str, period: int) -> LinearSource:
        site = sites[f"{prefix}.{name}"]
        return plain_linear(slots, site, period, cache)

    ffn: FeedForwardSource | MixtureSource
    if config.moe is not None and layer in config.mixture_layers():
        ffn = MixtureSource(
            slots,
            f"{prefix}.ffn",
            config.moe,
            sites[f"{prefix}.ffn.router"],
            sites[f"{prefix}.ffn.c_fc"],
            sites[f"{prefix}.ffn.c_proj"],
            periods.expert,
            "gelu_tanh",
        )
    else:
        c_fc, c_proj = linear("ffn.c_fc", periods.ffn), linear("ffn.c_proj", periods.ffn)
        ffn = FeedForwardSource(c_fc, c_proj, "gelu_tanh")
    projections = (linear("attention.qkv", periods.attention),)
    out = linear("attention.out", periods.attention)
    return LayerSource(
        attention=AttentionSource(projections, out, causal=True),
        norm_1=norm_source(slots, f"{prefix}.norm_1"),
        norm_2=norm_source(slots, f"{prefix}.norm_2"),
        ffn=ffn,
        recompute=config.activation_checkpointing,
    )


def plain_linear(
    slots: Slots, site: Site, period: int, cache: StepCache | None = None
) -> LinearSource:
    """Return the source of a layer that owns all of its tensors."""
    bias = f"{site.name}.bias" if site.bias else None
    return LinearSource(slots, site, period, bias, cache=cache)


def norm_source(slots: Slots, name: str, eps: float = NORM_EPS) -> NormSource:
    """Return the source of a layer normalisation."""
    return NormSource(slots, f"{name}.weight", f"{name}.bias", eps)
