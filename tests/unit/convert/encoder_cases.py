"""Encoders of every kind of sharing, and one made of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mpotrain.assemble import build_model
from mpotrain.convert.encoder_checks import encoder_problems
from mpotrain.convert.fill import Filled, fill
from mpotrain.convert.probe import difference, outputs, probe_batch, source_outputs
from mpotrain.convert.source import Source
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.nn.config import MPOSite
from mpotrain.nn.sharing_config import AdapterConfig, SharingConfig, StartConfig

TOKENS = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(3))
BASE = EncoderConfig(
    vocab_size=60, context_length=16, hidden_size=24, num_layers=4, num_heads=3, ffn_size=48
)
SQUARE = MPOSite(in_modes=(2, 3, 4), out_modes=(4, 3, 2))
ALL_MPO = EncoderSites(
    query=SQUARE,
    key=SQUARE,
    value=SQUARE,
    attention_out=SQUARE,
    c_fc=MPOSite(in_modes=(2, 3, 4), out_modes=(4, 3, 4)),
    c_proj=MPOSite(in_modes=(4, 3, 4), out_modes=(2, 3, 4)),
)
OTHER_MPO = replace(ALL_MPO, query=MPOSite(in_modes=(6, 2, 2), out_modes=(2, 2, 6)))
MIXED = EncoderSites(value=SQUARE, c_fc=ALL_MPO.c_fc)
ADAPTER = AdapterConfig(rank=3, families=("query", "c_fc"))


def encoder(scope: str, groups: int = 1, vectors: str = "own", **changes: Any) -> EncoderConfig:
    """Return a small encoder; everything beside the sharing may be named."""
    sharing = SharingConfig(scope=scope, groups=groups, vectors=vectors)  # type: ignore[arg-type]
    config = replace(BASE, sharing=sharing, **changes)
    assert config.problems("model") == []
    return config


def scaled(kind: str, unscaled_layers: int = 0) -> StartConfig:
    """Return start values that are scaled with the depth."""
    return StartConfig(auxiliary_scale=kind, unscaled_layers=unscaled_layers)  # type: ignore[arg-type]


def trained(config: AnyModel, seed: int = 0) -> Source:
    """Return a model in which no parameter has the value that it starts with."""
    model = build_model(config, seed=seed, dtype="fp32")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return Source("the source", config, weights)


def made(config: AnyModel, source: Source) -> tuple[Filled, nn.Module, float]:
    """Make a model of a source; return the weights, the model and how far its outputs are off."""
    if isinstance(config, EncoderConfig) and isinstance(source.config, EncoderConfig):
        assert encoder_problems(source.config, config) == []
    model = build_model(config, seed=9, dtype="fp32").eval()
    filled = fill(config, source, dict(model.named_parameters()))
    model.load_state_dict(filled.weights, strict=True)
    batch = probe_batch(config, TOKENS)
    return filled, model, difference(source_outputs(source, batch), outputs(model, batch))
