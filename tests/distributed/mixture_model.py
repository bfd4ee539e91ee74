"""A small GPT-2 with mixtures that have every role of parameter, and engines over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from distributed import toy_model as toy

from mpotrain.batch import Batch
from mpotrain.engine.base import Engine, StepResult
from mpotrain.engine.config import NO_MASK, CentralMaskConfig, DeepSpeedConfig, LocalConfig
from mpotrain.engine.deepspeed import DeepSpeedEngine
from mpotrain.engine.local import LocalEngine
from mpotrain.models.gpt2 import GPT2
from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.nn.config import DenseSite
from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    ExpertSiteConfig,
    MoEConfig,
    MPOExpertSite,
    RouterConfig,
)
from mpotrain.parallel.ranks import World
from mpotrain.train.config import AdamWConfig
from mpotrain.train.optim import build_optimizer

NUM_EXPERTS = 4
CLIP = 0.7
GLOBAL, MICRO = 16, 2
SEED = 11
FIVE_CORES = MPOExpertSite(
    start="independent",
    in_modes=(2, 2, 2, 2, 1),
    out_modes=(2, 2, 2, 2, 2),
)
ASYMMETRIC = AsymmetricExpertSite(start="independent", in_mode=8, out_mode=4, in_bond=4, out_bond=4)
TOP_1 = RouterConfig(z_loss=1e-3, balance_rate=1e-3, jitter=0.1)
TOP_2 = RouterConfig(top_k=2, capacity_factor=0.75, balance_loss=0.05)


def model_config(
    router: RouterConfig = TOP_1,
    c_fc: ExpertSiteConfig = FIVE_CORES,
    c_proj: ExpertSiteConfig | None = None,
    **changes: Any,
) -> GPT2Config:
    """Two blocks; the mixtures have five cores and dense matrices unless told otherwise."""
    settings: dict[str, Any] = {
        "vocab_size": toy.VOCABULARY,
        "context_length": toy.LENGTH,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_size": 32,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "init_std": 0.3,
        # The gradient of a key bias is zero but for rounding, which Adam blows up.
        "sites": GPT2Sites(qkv=DenseSite(bias=False)),
        "moe": MoEConfig(
            num_experts=NUM_EXPERTS,
            router=router,
            c_fc=c_fc,
            c_proj=DenseExpertSite() if c_proj is None else c_proj,
        ),
    }
    return GPT2Config(**(settings | changes))


def engine_of(
    world: World,
    engine: LocalConfig | DeepSpeedConfig,
    model_section: GPT2Config,
    *,
    expert_ranks: int = 1,
    mask: CentralMaskConfig = NO_MASK,
    clip: float | None = CLIP,
    change: Callable[[GPT2, torch.optim.Optimizer | None], None] | None = None,
) -> Engine:
    dtype = torch.bfloat16 if engine.dtype == "bf16" else torch.float32
    model = GPT2(model_section, seed=SEED, compute_dtype=dtype)
    if change is not None:
        change(model, None)
    optimizer = build_optimizer(model, AdamWConfig(core_lr_factor=0.5, weight_decay=0.1), mask)
    if change is not None:
        change(model, optimizer)
    if isinstance(engine, LocalConfig):
        return LocalEngine(
            model, optimizer, config=engine, world=world, seed=SEED, clip_norm=clip,
            central_mask=mask,
        )  # fmt: skip
    return DeepSpeedEngine(
        model, optimizer, config=engine, world=world, seed=SEED, clip_norm=clip,
        micro_batch_size=MICRO, accumulation=GLOBAL // MICRO // world.size,
        global_batch_size=GLOBAL, expert_ranks=expert_ranks, central_mask=mask,
    )  # fmt: skip


def run_steps(engine: Engine, first: int, last: int) -> list[StepResult]:
    world = engine.world
    return [
        engine.step(
            microbatches(step, world),
            lr=2.5e-3 * (1 + step) / 4,
            step=step,
            detail=True,
        )
        for step in range(first, last)
    ]


def microbatches(step: int, world: World) -> list[Batch]:
    return toy.microbatches(
        step, rank=world.rank, world=world.size, global_batch=GLOBAL, micro=MICRO
    )
