"""Cuts a network into the chunks of a pipeline and builds those of this rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import nn

from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.copies import chunk_layers
from mpotrain.engine.megatron.encoder import build_encoder
from mpotrain.engine.megatron.encoder_sources import layer_source, shared_names
from mpotrain.engine.megatron.feature_cuts import feature_periods
from mpotrain.engine.megatron.gpt import build_gpt
from mpotrain.engine.megatron.gpt_sources import gpt2_layer
from mpotrain.engine.megatron.holdings import Place, copied_names, held_names
from mpotrain.engine.megatron.kernels import Kernels, choose_kernels
from mpotrain.engine.megatron.placement import placement_of
from mpotrain.engine.megatron.seq2seq import build_t5
from mpotrain.engine.megatron.settings import transformer_config
from mpotrain.engine.megatron.slots import Slots, Whole
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.t5_config import T5Config
from mpotrain.nn.roles import Role
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.tensor.cached import StepCache


@dataclass(frozen=True)
class Chunks:
    """The chunks of this rank.

    Attributes:
        modules: in the order of virtual stages.
        first_place: where the first copy of each tensor lies that several chunks hold.
        places: place of each module.
        cache: of rebuilt matrices; None without.
        config: of megatron-core's modules and schedules.
    """

    modules: list[nn.Module]
    first_place: dict[str, Place]
    places: list[Place]
    cache: StepCache | None
    config: TransformerConfig


def build_chunks(
    model: AnyModel, engine: MegatronConfig, parallel: ParallelConfig, device: torch.device
) -> Chunks:
    """Build what this rank holds of a network; all parameters are zeros.

    Args:
        model: the network.
        engine: the engine section.
        parallel: the degrees; megatron-core's groups have been started for them.
        device: of the parameters.
    """
    held = held_names(model, parallel)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    places = [place for place in held if place[0] == stage]
    places.sort(key=lambda place: place[1])
    first: dict[str, Place] = {}
    for place, names in held.items():
        for name in names:
            first.setdefault(name, place)
    cache = StepCache() if engine.cache_weights else None
    config = transformer_config(model, engine, parallel, on_cuda=device.type == "cuda")
    kernels = choose_kernels(engine.extensions, config)
    modules = [
        _build(model, config, parallel, place, held, device, cache, kernels) for place in places
    ]
    copied = copied_names(held)
    return Chunks(modules, {name: first[name] for name in copied}, places, cache, config)


def _build(
    model: AnyModel,
    config: TransformerConfig,
    parallel: ParallelConfig,
    place: Place,
    held: dict[Place, set[str]],
    device: torch.device,
    cache: StepCache | None,
    kernels: Kernels,
) -> nn.Module:
    slots = Slots(
        {p.name: Whole(p.shape, Role(p.role), p.num_experts) for p in model.parameters()},
        shared=shared_names(model) if isinstance(model, EncoderConfig) else (),
        copied=copied_names(held),
        device=device,
        dtype=config.params_dtype,
    )
    order = list(held)
    periods = feature_periods(model, parallel.tensor, parallel.expert_tensor)
    chunk: nn.Module
    if isinstance(model, T5Config):
        chunk = build_t5(model, config, slots, cache=cache, kernels=kernels)
    else:
        layers = chunk_layers(model.num_layers, parallel.pipeline, parallel.virtual_pipeline)
        is_first, is_last = place == order[0], place == order[-1]
        vp_stage = place[1] if parallel.virtual_pipeline > 1 else None
        if isinstance(model, EncoderConfig):
            sources = {n: layer_source(model, n, slots, periods, cache) for n in layers[place]}
            chunk = build_encoder(
                model, config, slots, sources,
                pre_process=is_first, post_process=is_last, vp_stage=vp_stage, kernels=kernels,
            )  # fmt: skip
        else:
            sources = {n: gpt2_layer(model, n, slots, periods, cache) for n in layers[place]}
            chunk = build_gpt(
                model, config, slots, sources,
                pre_process=is_first, post_process=is_last, vp_stage=vp_stage, kernels=kernels,
            )  # fmt: skip
    _check_names(chunk.parameters(), held[place])
    return chunk


def _check_names(parameters: Iterable[nn.Parameter], expected: set[str]) -> None:
    """Hold what was built against what the chunk should hold."""
    names = [placement_of(parameter).name for parameter in parameters]
    if sorted(names) != sorted(expected):
        raise AssertionError(
            f"missing {sorted(expected - set(names))}, unexpected {sorted(set(names) - expected)}, "
            f"several times {sorted({n for n in names if names.count(n) > 1})}"
        )
