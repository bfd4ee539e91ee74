"""Engines over the toy model, and ways to run and compare them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import toy_model as toy
from torch import nn
from torch.func import functional_call

from mpotrain.engine.base import Engine, StepResult
from mpotrain.engine.config import DeepSpeedConfig, LocalConfig
from mpotrain.engine.deepspeed import DeepSpeedEngine
from mpotrain.engine.local import LocalEngine
from mpotrain.parallel.ranks import World

CPU_WORLD = World(0, 1, 0, torch.device("cpu"))
CLIP = 0.7
GLOBAL, MICRO = 16, 2
SEED = 11
State = dict[str, dict[str, torch.Tensor]]
SMALL = {"reduce_bucket_elements": 300, "gather_bucket_elements": 300, "persistence_threshold": 100}


def zero(stage: int, **settings: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig(**{"zero_stage": stage, "device": "cpu", **SMALL, **settings})


def local_engine(
    *, dtype: str = "fp32", dropout: float = 0.0, seed: int = 0, clip: float | None = CLIP
) -> LocalEngine:
    model = toy.build(dtype=getattr(torch, DTYPES[dtype]), dropout=dropout, seed=seed)
    return LocalEngine(
        model,
        toy.build_optimizer(model),
        config=LocalConfig(dtype=dtype, device="cpu"),
        world=CPU_WORLD,
        seed=SEED,
        clip_norm=clip,
    )


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def deepspeed_engine(
    world: World,
    config: DeepSpeedConfig,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    clip: float | None = CLIP,
) -> DeepSpeedEngine:
    model = toy.build(dtype=getattr(torch, DTYPES[config.dtype]), dropout=dropout, seed=seed)
    return DeepSpeedEngine(
        model,
        toy.build_optimizer(model),
        config=config,
        world=world,
        seed=SEED,
        clip_norm=clip,
        micro_batch_size=MICRO,
        accumulation=GLOBAL // MICRO // world.size,
        global_batch_size=GLOBAL,
    )


def run_steps(engine: Engine, first: int, last: int, **extra: Any) -> list[StepResult]:
    world = engine.world
    return [
        engine.step(
            toy.microbatches(step, rank=world.rank, world=world.size),
            lr=toy.LR * (1 + step) / 4,
            step=step,
            detail=True,
            **extra,
        )
        for step in range(first, last)
    ]


def whole_state(engine: Engine) -> State:
    """All tensors of all owners, on every rank."""
    mine = {s.name: dict(s.tensors) for s in engine.export_state() if s.tensors is not None}
    merged: State = {}
    for part in engine.world.gather_objects(mine):
        assert not merged.keys() & part.keys()
        merged |= part
    return merged


def largest_difference(a: State, b: State) -> float:
    assert a.keys() == b.keys()
    differences = []
    for name in a:
        assert a[name].keys() == b[name].keys(), name
        differences += [
            float((a[name][k] - b[name][k]).abs().max() / b[name][k].abs().max().clamp(min=1e-6))
            for k in a[name]
        ]
    return max(differences)


def compute_with_bf16_weights(model: nn.Module) -> None:
    """Let a bf16 model of the local engine compute with its weights as DeepSpeed rounds them.

    The fp32 weights stay as masters; the gradient of every micro-batch is rounded to bf16 too.
    """
    whole = model.forward

    def rounded(*args: Any, **kwargs: Any) -> Any:
        weights = {name: p.bfloat16().float() for name, p in model.named_parameters()}
        model.forward = whole
        try:
            return functional_call(model, weights, args, kwargs)
        finally:
            model.forward = rounded

    model.forward = rounded


def same_bits(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys()
        and all(
            torch.equal(a[name][k].view(torch.int32), b[name][k].view(torch.int32)) for k in a[name]
        )
        for name in a
    )


def assert_same_steps(got: list[StepResult], wanted: list[StepResult], rel: float) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert (one.skipped, one.num_tokens) == (other.skipped, other.num_tokens)
        assert one.loss == pytest.approx(other.loss, rel=rel)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=rel)
        assert one.grad_norm_by_role == pytest.approx(other.grad_norm_by_role, rel=rel)


OFFLOADED = [
    zero(1, offload_optimizer=True),
    zero(2, offload_optimizer=True, dtype="bf16"),
    zero(3, offload_optimizer=True, offload_parameters=True),
]


EVERY_KIND = [
    zero(0),
    *(zero(stage, dtype=dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")),
    *OFFLOADED,
]
