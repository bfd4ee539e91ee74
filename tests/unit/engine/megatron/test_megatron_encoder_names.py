"""Which tensors the layers of an encoder use, and which of them exist more than once."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.models.encoder_cases import (
    ALL,
    CENTRAL_TIED,
    DEEPNORM,
    EVERY_KIND,
    FIVE_CORES,
    SOME_DENSE,
    encoder_config,
)

from mpotrain.config import load_config
from mpotrain.engine.megatron.copies import chunk_layers, names_of_several
from mpotrain.engine.megatron.encoder_sources import layer_source, shared_names
from mpotrain.engine.megatron.feature_cuts import feature_periods
from mpotrain.engine.megatron.holdings import layer_names
from mpotrain.engine.megatron.slots import Slots
from mpotrain.engine.megatron.sources import (
    FeedForwardSource,
    LayerSource,
    LinearSource,
    NormSource,
)
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.sites import site_parameters
from mpotrain.nn.encoder_block import EncoderBlock
from mpotrain.nn.sharing_config import SharingConfig

RUNS = sorted((Path(__file__).parents[4] / "configs" / "runs").glob("*.toml"))
OUTSIDE = (
    "token_embedding", "position_embedding", "type_embedding", "embedding_norm", "embedding_map",
    "final_norm", "pooler", "pair_head", "mlm_head",
)  # fmt: skip


def encoder_runs() -> dict[str, EncoderConfig]:
    models = {path.stem: load_config(path).model for path in RUNS}
    return {name: model for name, model in models.items() if isinstance(model, EncoderConfig)}


def named(config: EncoderConfig, layer: int) -> set[str]:
    return layer_names(config, layer, {info.name for info in config.parameters()})


def source(config: EncoderConfig, layer: int) -> LayerSource:
    slots = Slots({}, device=torch.device("cpu"), dtype=torch.float32)
    return layer_source(config, layer, slots, feature_periods(config, 1, 1))


def source_names(part: Any) -> set[str]:
    """All logical names in a source, found by walking through it."""
    if isinstance(part, LinearSource):
        # The site says which cores or weights there are; the source which bias it reads.
        own = {info.name for info in site_parameters(part.site)} - {f"{part.site.name}.bias"}
        given = {part.bias, part.central, *(part.adapter or ())}
        return own | {name for name in given if name is not None}
    if isinstance(part, NormSource):
        return {name for name in (part.weight, part.bias) if name is not None}
    if isinstance(part, tuple):
        return set[str]().union(*map(source_names, part))
    if is_dataclass(part):
        return set[str]().union(*(source_names(getattr(part, f.name)) for f in fields(part)))
    return set()


def used_by_layer(model: Encoder, layer: int) -> set[str]:
    """Names of what the local network computes a layer with."""
    config = model.config
    block = model.blocks[config.block(layer)]
    given = [tensor for parts in model.given(layer).values() for tensor in parts.values()]
    used = {id(tensor) for tensor in [*block.parameters(), *given]}
    return {name for name, tensor in model.named_parameters() if id(tensor) in used}


def test_layers_and_ends_hold_every_tensor_of_every_encoder_run() -> None:
    runs = encoder_runs()
    assert len(runs) >= 7
    for name, config in runs.items():
        everything = {info.name for info in config.parameters()}
        layers = [named(config, layer) for layer in range(config.num_layers)]
        outside = {n for n in everything if n.split(".")[0] in OUTSIDE}
        assert set[str]().union(*layers) == everything - outside, name
        assert all(len(layer) == len(layers[0]) for layer in layers), name


@pytest.mark.parametrize("config", EVERY_KIND)
def test_a_layer_names_what_the_local_network_computes_it_with(config: EncoderConfig) -> None:
    model = Encoder(config, seed=1)
    for layer in range(config.num_layers):
        names = named(config, layer)
        assert names == used_by_layer(model, layer)
        assert names == source_names(source(config, layer))


@pytest.mark.parametrize("config", EVERY_KIND)
def test_shared_is_what_several_layers_use_and_the_matrix_of_tokens(config: EncoderConfig) -> None:
    model = Encoder(config, seed=1)
    layers = [used_by_layer(model, layer) for layer in range(config.num_layers)]
    several = {n for names in layers for n in names if sum(n in other for other in layers) > 1}
    tokens = {n for n, _ in model.named_parameters() if n.startswith("token_embedding.")}
    assert shared_names(config) == several | tokens


def test_shared_names_by_scope() -> None:
    def shared(**changes: Any) -> set[str]:
        return set(shared_names(encoder_config(**changes))) - {"token_embedding.weight"}

    assert shared(sharing=SharingConfig()) == set()
    banked = shared(sharing=SharingConfig(scope="central", groups=2))
    families = ("query", "key", "value", "attention_out", "c_fc", "c_proj")
    assert banked == {f"bank.{family}.{group}" for family in families for group in (0, 1)}
    tied = shared(sharing=CENTRAL_TIED) - banked
    assert len(tied) == 2 * (len(families) + 4)
    assert all(name.startswith("tied.") for name in tied)
    assert all(name.startswith("blocks.") for name in shared(sharing=ALL))
    # A group of one layer shares nothing.
    assert shared(sharing=SharingConfig(scope="central", groups=4)) == set()
    assert shared(sharing=SharingConfig(scope="all", groups=4)) == set()


def test_a_source_says_what_the_local_block_does() -> None:
    for config in (
        encoder_config(norm="pre", norm_eps=1e-3, activation="relu"),
        encoder_config(start=DEEPNORM, activation_checkpointing=True),
    ):
        block = Encoder(config, seed=1).blocks[0]
        assert isinstance(block, EncoderBlock)
        found = source(config, 3)
        assert found.is_post_norm == block.is_post_norm
        assert found.residual_scale == block.residual_scale
        assert found.norm_1.eps == found.norm_2.eps == block.norm_eps
        assert found.recompute == config.activation_checkpointing
        assert not found.attention.causal
        assert found.attention.scale is None
        assert isinstance(found.ffn, FeedForwardSource)
        assert found.ffn.activation == config.activation


def test_periods_go_where_features_meet() -> None:
    config = encoder_config(sites=FIVE_CORES)
    found = source(config, 0)
    assert isinstance(found.ffn, FeedForwardSource)
    assert {part.period for part in (*found.attention.projections, found.attention.out)} == {16}
    assert {found.ffn.c_fc.period, found.ffn.c_proj.period} == {32}


def test_sites_and_shared_parts_of_a_layer() -> None:
    config = encoder_config(sharing=CENTRAL_TIED, sites=SOME_DENSE)
    query, key, value = source(config, 3).attention.projections
    assert query.site.name == "blocks.3.attention.query"
    assert (query.central, query.bias) == ("bank.query.1", "tied.1.query_bias")
    # A dense family has no central tensor, and this one no bias.
    assert (key.central, key.bias) == (None, None)
    assert (value.central, value.bias) == (None, "tied.1.value_bias")
    assert source(config, 3).norm_2.weight == "tied.1.ffn_norm_weight"
    albert = source(encoder_config(sharing=ALL), 3)
    assert albert.attention.out.site.name == "blocks.1.attention.out"
    assert albert.norm_1.bias == "blocks.1.attention_norm.bias"


def test_names_of_several_holders() -> None:
    assert names_of_several([{"a", "b"}, {"b", "c"}, {"c", "b"}]) == {"b", "c"}
    # One holder that names a tensor twice has no copy of it.
    assert names_of_several([["a", "a"], ["b"]]) == set()


def test_chunks_follow_each_other_over_the_stages() -> None:
    assert chunk_layers(8, 1) == {(0, 0): range(8)}
    assert chunk_layers(8, 2) == {(0, 0): range(4), (1, 0): range(4, 8)}
    # As in Megatron-core: stage 0 has layers 0, 1, 4, 5.
    cut = chunk_layers(8, 2, 2)
    assert list(cut.items()) == [
        ((0, 0), range(2)),
        ((1, 0), range(2, 4)),
        ((0, 1), range(4, 6)),
        ((1, 1), range(6, 8)),
    ]


def test_copies_of_a_cut_encoder() -> None:
    config = encoder_config(sharing=CENTRAL_TIED)
    layers = [named(config, layer) for layer in range(4)]
    # Two chunks of two layers: each group of layers lies in one chunk, and nothing is copied.
    assert names_of_several([layers[0] | layers[1], layers[2] | layers[3]]) == set()
    # One layer in each chunk: all that is shared is copied.
    assert names_of_several(layers) == shared_names(config) - {"token_embedding.weight"}
