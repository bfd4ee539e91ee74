"""Transformer layers of the Megatron engine, in a block, beside the local layers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.megatron_comparison import (
    DOUBLE,
    Sequences,
    difference,
    differences,
    draw,
    load,
    make_micro,
    redraw,
    whole_gradients,
)
from distributed.megatron_grid import megatron_grid
from distributed.megatron_layer_cases import (
    BATCH,
    HEADS,
    HIDDEN,
    LAYOUTS,
    LENGTH,
    Case,
    build_block,
    local_layers,
    make_inputs,
    run_block,
    run_local,
)

from mpotrain.models.gpt2 import GPT2
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.nn.block import AUXILIARY_LOSS
from mpotrain.nn.moe.config import MoEConfig, MPOExpertSite, RouterConfig
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

Run = Callable[[int], Callable[..., list[Any]]]
TOLERANCE = 1e-11
CASES = {
    "gpt2": Case("gpt2"),
    "gpt2 documents": Case("gpt2", documents=True, recompute=True),
    "gpt2 shared": Case("gpt2", recompute=True, shared=True),
    "post-norm": Case("post-norm", documents=True),
    "post-norm shared": Case("post-norm", recompute=True, shared=True),
    "pre-norm": Case("pre-norm"),
    "t5": Case("t5"),
    "t5 documents": Case("t5", documents=True, recompute=True),
}


def compare(
    world: World, layout: dict[str, Any], cases: dict[str, Case]
) -> dict[str, dict[str, float]]:
    """Differences of output and all gradients from the local layers, of each case."""
    parallel = ParallelConfig(**layout)
    with megatron_grid(world, parallel):
        return {name: errors(parallel, case) for name, case in cases.items()}


def errors(parallel: ParallelConfig, case: Case) -> dict[str, float]:
    from megatron.core import parallel_state

    from mpotrain.engine.megatron.placement import Cut

    local, given = local_layers(case), make_inputs(case)
    expected = run_local(local, case, given)
    block, whole = build_block(local, parallel, case)
    found = run_block(block, parallel, given)
    assert found.keys() == expected.keys()
    ranks = Sequences(parallel)
    rank = parallel_state.get_tensor_model_parallel_rank()
    heads = Cut(1, parallel.tensor, rank, period=HEADS // 2)
    result = differences(whole_gradients(whole), local)
    for name, value in expected.items():
        part = heads.take(value) if name == "terms" else ranks.mine(value)
        result[name] = difference(found[name], part)
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_equal_the_local_ones(run_ranks: Run, layout: str) -> None:
    size, degrees = LAYOUTS[layout]
    for told in run_ranks(size)(compare, degrees, CASES):
        for name, found in told.items():
            assert max(found.values()) < TOLERANCE, (name, found)


MIXTURE = GPT2Config(
    vocab_size=8,
    context_length=LENGTH,
    hidden_size=HIDDEN,
    num_layers=1,
    num_heads=HEADS,
    ffn_size=32,
    dropout=0.0,
    attention_dropout=0.0,
    moe=MoEConfig(
        num_experts=4,
        router=RouterConfig(top_k=2, balance_loss=0.3, z_loss=0.2),
        c_fc=MPOExpertSite(in_modes=(2, 4, 2), out_modes=(4, 4, 2), cap=4),
        c_proj=MPOExpertSite(in_modes=(4, 4, 2), out_modes=(2, 4, 2), cap=4),
    ),
)


def mixture_errors(world: World, layout: dict[str, Any], recompute: bool) -> dict[str, float]:
    """A layer with a mixture, its tally closed before the backward pass, beside the local one."""
    parallel = ParallelConfig(**layout)
    with megatron_grid(world, parallel):
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.spec_utils import build_module

        from mpotrain.engine.megatron.config import MegatronConfig
        from mpotrain.engine.megatron.feature_cuts import feature_periods
        from mpotrain.engine.megatron.gpt_sources import gpt2_layer
        from mpotrain.engine.megatron.layer import layer_spec
        from mpotrain.engine.megatron.settings import transformer_config
        from mpotrain.engine.megatron.slots import Slots, Whole
        from mpotrain.nn.roles import Role

        model = replace(MIXTURE, activation_checkpointing=recompute)
        local = redraw(GPT2(model, seed=1), std=0.3)
        assert isinstance(local, GPT2)
        tensors = dict(local.named_parameters())
        wholes = {
            info.name: Whole(info.shape, Role(info.role), info.num_experts)
            for info in model.parameters()
        }
        slots = Slots(wholes, device=torch.device("cpu"), dtype=DOUBLE)
        config = transformer_config(model, MegatronConfig(), parallel, on_cuda=False)
        config.params_dtype = DOUBLE
        source = gpt2_layer(model, 0, slots, feature_periods(model, parallel.tensor, 1))
        layer = build_module(layer_spec(source), config=config, layer_number=1)
        assert isinstance(layer.mlp, MoELayer)
        assert layer.is_moe_layer
        load(layer, tensors)

        x, upstream = (draw(BATCH, LENGTH, HIDDEN, seed=n) for n in (1, 2))
        inputs = x.clone().requires_grad_()
        expected, told = local.blocks[0](inputs)
        ((expected * upstream).sum() + 3.0 * told[AUXILIARY_LOSS]).backward()

        ranks = Sequences(parallel)
        micro = replace(make_micro(), auxiliary_scale=3.0)
        mine = ranks.mine(x).requires_grad_()
        y = ranks.leave(layer(ranks.enter(mine), attention_bias=micro)[0])
        statistics = {name: dict(value) for name, value in micro.tally.told.items()}
        micro.tally.is_open = False
        (y * ranks.mine(upstream)).sum().backward()
        assert {name: dict(value) for name, value in micro.tally.told.items()} == statistics
        assert inputs.grad is not None
        assert mine.grad is not None
        found = {"y": difference(y.detach(), ranks.mine(expected.detach()))}
        found["x"] = difference(mine.grad, ranks.mine(inputs.grad))
        for name, grad in whole_gradients(layer).items():
            wanted = tensors[name].grad
            assert wanted is not None
            found[name] = difference(grad, wanted)
        tokens = statistics["blocks.0.ffn"]["tokens"]
        assert int(tokens) == BATCH * LENGTH
        return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["one rank", "cp 2", "tp 2 sp"])
def test_layer_with_a_mixture(run_ranks: Run, layout: str, recompute: bool) -> None:
    size, degrees = LAYOUTS[layout]
    for told in run_ranks(size)(mixture_errors, degrees, recompute):
        # Gates and losses of routers are computed in fp32, in either engine.
        assert max(told.values()) < 1e-6, told


def noise(world: World) -> list[str]:
    """Return what building and running layers logs and warns of."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    parallel = ParallelConfig()
    keep, logger = Keep(), logging.getLogger("megatron")
    with megatron_grid(world, parallel), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger.addHandler(keep)
        try:
            for kind in ("gpt2", "t5"):
                case = Case(kind, recompute=True)
                block, _ = build_block(local_layers(case), parallel, case)
                run_block(block, parallel, make_inputs(case))
        finally:
            logger.removeHandler(keep)
    return lines + [str(warning.message) for warning in caught]


def test_layers_are_built_and_run_without_a_warning(run_ranks: Run) -> None:
    assert run_ranks(1)(noise) == [[]]
