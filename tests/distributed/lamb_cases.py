"""LAMB engines on small models, trained for a few steps."""

from __future__ import annotations

from typing import Any

import torch
from distributed import toy_model as toy
from distributed.engines import (
    CPU_WORLD,
    GLOBAL,
    MICRO,
    SEED,
    State,
    assert_same_steps,
    largest_difference,
    same_bits,
    whole_state,
)
from torch import nn

from mpotrain.engine.base import Engine, StepResult
from mpotrain.engine.config import NO_MASK, CentralMaskConfig, DeepSpeedConfig, LocalConfig
from mpotrain.engine.deepspeed import DeepSpeedEngine
from mpotrain.engine.layerwise import WholeTensors
from mpotrain.engine.local import LocalEngine
from mpotrain.models.gpt2 import GPT2
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.parallel.ranks import World
from mpotrain.train.config import LambConfig
from mpotrain.train.lamb import Lamb
from mpotrain.train.optim import build_optimizer

LOCAL = LocalConfig(device="cpu")
STEPS = 5
CLIP = 0.7
LAMB = LambConfig(core_lr_factor=0.5, weight_decay=0.1, core_weight_decay=0.05)
EVERYTHING = LambConfig(weight_decay=0.1, adapt_vectors=True, max_trust=2.0)
BOUNDED = LambConfig(weight_decay=0.1, min_trust=0.2, max_trust=0.3)
Model = GPT2Config | None
"""A model section; None = the toy model."""


def engine_of(
    world: World,
    config: DeepSpeedConfig | LocalConfig,
    *,
    lamb: LambConfig = LAMB,
    model_section: Model = None,
    expert_ranks: int = 1,
    mask: CentralMaskConfig = NO_MASK,
    seed: int = 0,
    flat_norms: bool = False,
) -> Engine:
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    model: nn.Module
    if model_section is None:
        model = toy.build(dtype=dtype, seed=seed)
    else:
        model = GPT2(model_section, seed=seed, compute_dtype=dtype)
    optimizer = build_optimizer(model, lamb, mask)
    engine: Engine
    if isinstance(config, LocalConfig):
        engine = LocalEngine(
            model, optimizer, config=config, world=world, seed=SEED, clip_norm=CLIP,
            central_mask=mask,
        )  # fmt: skip
    else:
        engine = DeepSpeedEngine(
            model, optimizer, config=config, world=world, seed=SEED, clip_norm=CLIP,
            micro_batch_size=MICRO, accumulation=GLOBAL // MICRO // world.size,
            global_batch_size=GLOBAL, expert_ranks=expert_ranks, central_mask=mask,
        )  # fmt: skip
    if flat_norms:
        assert isinstance(optimizer, Lamb)
        optimizer.use_layers(WholeTensors())
    return engine


def rate(step: int) -> float:
    return 1e-2 * (1 + step) / 4


def advance(engine: Engine, first: int, last: int, **extra: Any) -> list[StepResult]:
    rank, size = engine.world.rank, engine.world.size
    return [
        engine.step(
            toy.microbatches(step, rank=rank, world=size),
            lr=rate(step),
            step=step,
            detail=True,
            **extra,
        )
        for step in range(first, last)
    ]


def train(
    world: World, config: DeepSpeedConfig | LocalConfig, settings: dict[str, Any]
) -> tuple[list[StepResult], State]:
    engine = engine_of(world, config, **settings)
    results = advance(engine, 0, STEPS)
    state = whole_state(engine)
    engine.close()
    return results, state


def assert_equal_to_local(outcomes: list[Any], settings: dict[str, Any]) -> None:
    wanted, wanted_state = train(CPU_WORLD, LOCAL, settings)
    assert any(result.grad_norm > CLIP for result in wanted)
    for results, state in outcomes:
        assert_same_steps(results, wanted, 1e-5)
        assert state["central" if "central" in state else next(iter(state))].keys() == {
            "weight",
            "exp_avg",
            "exp_avg_sq",
        }
        assert largest_difference(state, wanted_state) < 1e-5
    assert all(same_bits(state, outcomes[0][1]) for _, state in outcomes)
