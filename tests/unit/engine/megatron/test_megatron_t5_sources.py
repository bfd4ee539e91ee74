"""What the layers of a T5 are made of: every tensor of the network once, and its arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from unit.models.t5_cases import SMALL

from mpotrain.config import load_config
from mpotrain.engine.megatron.feature_cuts import FeaturePeriods, feature_periods
from mpotrain.engine.megatron.seq2seq_sources import T5Sources
from mpotrain.engine.megatron.slots import Slots
from mpotrain.engine.megatron.sources import (
    FeedForwardSource,
    LayerSource,
    LinearSource,
    MixtureSource,
    NormSource,
)
from mpotrain.models.sites import Site, site_parameters
from mpotrain.models.t5_config import T5Config, T5Sites
from mpotrain.nn.config import DenseSite, TTMSite
from mpotrain.nn.moe.config import MoEConfig, MPOExpertSite, RouterConfig
from mpotrain.tensor.cached import StepCache

RUNS = sorted((Path(__file__).parents[4] / "configs" / "runs").glob("*t5*.toml"))
OUTSIDE = (
    "token_embedding.weight", "encoder.relative_bias.weight", "decoder.relative_bias.weight",
)  # fmt: skip
SOME = replace(
    SMALL,
    dropout=0.25,
    activation_checkpointing=True,
    # A bias that is asked for is not there: T5 has none.
    sites=T5Sites(query=DenseSite(bias=True), c_fc=TTMSite(rank=8)),
    moe=MoEConfig(
        num_experts=4,
        every=2,
        router=RouterConfig(bias=True),
        c_fc=MPOExpertSite(in_modes=(2, 6, 2), out_modes=(4, 3, 4)),
    ),
)


def sources(model: T5Config, **given: Any) -> T5Sources:
    slots = Slots({}, device=torch.device("cpu"), dtype=torch.float32)
    return T5Sources(model, slots, feature_periods(model, 1, 1), **given)


def linears(part: Any) -> Iterator[LinearSource]:
    if isinstance(part, LinearSource):
        yield part
    elif isinstance(part, tuple):
        for inner in part:
            yield from linears(inner)
    elif is_dataclass(part) and not isinstance(part, Site):
        for field in fields(part):
            yield from linears(getattr(part, field.name))


def names(part: Any) -> Iterator[str]:
    """Every logical name in a source, as often as it is there."""
    if isinstance(part, Site):
        yield from (info.name for info in site_parameters(part))
    elif isinstance(part, LinearSource):
        assert part.bias is part.central is part.adapter is None
        yield from names(part.site)
    elif isinstance(part, NormSource):
        assert part.bias is None
        yield part.weight
    elif isinstance(part, tuple):
        for inner in part:
            yield from names(inner)
    elif is_dataclass(part):
        for field in fields(part):
            yield from names(getattr(part, field.name))


def runs() -> dict[str, T5Config]:
    models = {path.stem: load_config(path).model for path in RUNS}
    found = {name: model for name, model in models.items() if isinstance(model, T5Config)}
    assert len(found) >= 5
    return found


def test_layers_and_ends_hold_every_tensor_once() -> None:
    for label, model in {**runs(), "some": SOME}.items():
        made = sources(model)
        found = Counter(OUTSIDE)
        for stack in ("encoder", "decoder"):
            found.update(names(made.norm(f"{stack}.final_norm")))
            for layer in made.layers(stack):
                found.update(names(layer))
        assert found == Counter(info.name for info in model.parameters()), label


def layers(stack: str) -> list[LayerSource]:
    return sources(SOME).layers(stack)


def test_layers_compute_as_those_of_t5() -> None:
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        made = layers(stack)
        assert len(made) == depth
        for n, layer in enumerate(made):
            assert layer.recompute
            assert not layer.is_post_norm
            assert layer.norm_1.eps == SOME.norm_eps
            assert layer.attention.scale == 1.0
            assert layer.attention.causal == (stack == "decoder")
            assert (layer.cross_attention is not None) == (stack == "decoder")
            assert isinstance(layer.ffn, MixtureSource) == (n == 1)
            assert layer.ffn.activation == "relu"
            if isinstance(layer.ffn, FeedForwardSource):
                assert layer.ffn.dropout == 0.25


def test_cross_attention_sees_the_whole_source() -> None:
    layer = layers("decoder")[2]
    assert layer.cross_attention is not None
    assert not layer.cross_attention.causal
    assert layer.cross_attention.scale == 1.0
    leaves = [linear.site.name for linear in linears(layer.cross_attention)]
    stem = "decoder.blocks.2.cross_attention."
    assert leaves == [stem + leaf for leaf in ("query", "key", "value", "out")]


def test_features_are_cut_by_the_period_of_where_they_meet() -> None:
    slots = Slots({}, device=torch.device("cpu"), dtype=torch.float32)
    cache = StepCache()
    made = T5Sources(SOME, slots, FeaturePeriods(attention=20, ffn=24, expert=12), cache=cache)
    for layer in made.layers("decoder"):
        for linear in linears(layer):
            assert linear.period == (24 if ".ffn." in linear.site.name else 20)
            assert linear.cache is cache
        if isinstance(layer.ffn, MixtureSource):
            assert layer.ffn.period == 12


def test_recomputation_is_what_the_run_file_says() -> None:
    made = sources(replace(SOME, activation_checkpointing=False))
    assert not any(layer.recompute for layer in made.layers("encoder"))
