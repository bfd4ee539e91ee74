"""A NaN on one rank of an expert-parallel world: the step is given up everywhere, traceless."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.engines import State, same_bits, whole_state, zero
from distributed.mixture_model import engine_of, model_config, run_steps
from torch import Tensor

from mpotrain.engine.base import Engine, StepResult
from mpotrain.engine.config import DeepSpeedConfig
from mpotrain.parallel.ranks import World

SICK_RANK = 1
GRADIENTS = (
    "blocks.0.ffn.c_proj.weight",
    "blocks.1.ffn.c_fc.auxiliaries.0",
    "blocks.0.ffn.c_fc.central",
    "blocks.1.ffn.router.weight",
)
ACTIVATION = "input of block 1"
LOSS = "loss"
PLACES = (*GRADIENTS, ACTIVATION, LOSS)
BALANCE = "blocks.0.ffn.router.balance"


class Poison:
    """Hooks that put one NaN into what this rank computes at `place`; None = healthy."""

    def __init__(self, engine: Engine) -> None:
        self.place: str | None = None
        if engine.world.rank != SICK_RANK:
            return
        for name, parameter in engine.model.named_parameters():
            if name in GRADIENTS:
                parameter.register_hook(lambda gradient, name=name: self.given(gradient, name))
        block = engine.model.get_submodule("blocks.1")
        block.register_forward_pre_hook(lambda _, inputs: (self.given(inputs[0], ACTIVATION),))
        # A sum leaves the gradients finite here: DeepSpeed itself finds nothing wrong.
        engine.model.register_forward_hook(
            lambda _, __, told: replace(told, loss_sum=self.given(told.loss_sum, LOSS))
        )

    def given(self, tensor: Tensor, place: str) -> Tensor:
        if place != self.place:
            return tensor
        poison = torch.zeros_like(tensor)
        poison.view(-1)[0] = float("nan")
        return tensor + poison


def local_bits(engine: Engine) -> dict[str, Tensor]:
    """Copy what this very rank computes with: weights in their own dtype, and buffers."""
    tensors = [*engine.model.named_parameters(), *engine.model.named_buffers()]
    return {name: t.detach().clone().view(torch.uint8) for name, t in tensors}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def poison_every_place(
    world: World, config: DeepSpeedConfig
) -> tuple[dict[str, tuple[StepResult, bool, int]], State, State, bool, bool]:
    """Train two steps, one poisoned step for each place and a healthy one; and without poison."""
    engine = engine_of(world, config, model_config(), expert_ranks=2)
    poison = Poison(engine)
    run_steps(engine, 0, 2)
    before, here = whole_state(engine), local_bits(engine)
    found = {}
    for step, place in enumerate(PLACES, start=2):
        poison.place = place
        (result,) = run_steps(engine, step, step + 1)
        untouched = same_bits(before, whole_state(engine)) and equal(here, local_bits(engine))
        found[place] = result, untouched, engine.num_updates
    poison.place = None
    healthy = 2 + len(PLACES)
    got = run_steps(engine, healthy, healthy + 1)
    after, here = whole_state(engine), local_bits(engine)
    engine.close()
    straight = engine_of(world, config, model_config(), expert_ranks=2)
    run_steps(straight, 0, 2)
    same = same_step(got, run_steps(straight, healthy, healthy + 1))
    same_end = same_bits(after, whole_state(straight)) and equal(here, local_bits(straight))
    straight.close()
    return found, before, after, same, same_end


def same_step(got: list[StepResult], wanted: list[StepResult]) -> bool:
    (one,), (other,) = got, wanted
    return (one.skipped, one.loss, one.grad_norm) == (False, other.loss, other.grad_norm)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_nan_on_one_rank_leaves_no_trace_on_any(run_ranks: Any, stage: int, dtype: str) -> None:
    for found, before, after, same, same_end in run_ranks(2)(
        poison_every_place, zero(stage, dtype=dtype)
    ):
        assert before[BALANCE]["weight"].any()
        for place, (result, untouched, num_updates) in found.items():
            what = "gradient norm" if place in GRADIENTS else "loss"
            assert math.isfinite(result.loss) == (place in GRADIENTS), place
            assert math.isfinite(result.grad_norm) == (place == LOSS), place
            assert (result.skipped, result.reason) == (True, f"{what} is nan"), place
            assert (untouched, num_updates) == (True, 2), place
        assert (same, same_end) == (True, True)
        assert not any(
            same_bits({n: before[n]}, {n: after[n]}) for n in before if "balance" not in n
        )
