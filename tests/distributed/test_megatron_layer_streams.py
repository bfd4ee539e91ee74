"""Recomputation and dropout of the Megatron engine's layers: which random stream is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed.megatron_comparison import (
    draw,
    make_micro,
)
from distributed.megatron_grid import megatron_grid
from distributed.megatron_layer_cases import (
    BATCH,
    HIDDEN,
    LAYOUTS,
    LENGTH,
    Case,
    build_block,
    local_layers,
    make_inputs,
    run_block,
)
from torch import Tensor

from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

Run = Callable[[int], Callable[..., list[Any]]]


def drop_twice(world: World, layout: dict[str, Any], kinds: list[str]) -> dict[str, list[bool]]:
    """With dropout: do recomputed layers equal kept ones bit for bit, and leave the streams so?"""
    parallel = ParallelConfig(**layout)
    told = {}
    with megatron_grid(world, parallel):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        streams = get_cuda_rng_tracker().get_states()
        for kind in kinds:
            results = []
            for recompute, seed in ((False, 1), (True, 1), (True, 2)):
                case = Case(kind, recompute=recompute, dropout=0.3)
                local, given = local_layers(case), make_inputs(case)
                block, whole = build_block(local, parallel, case)
                torch.manual_seed(seed)
                get_cuda_rng_tracker().set_states(dict(streams))
                if parallel.sequence and seed == 2:
                    with get_cuda_rng_tracker().fork():
                        torch.rand(3)
                found = run_block(block, parallel, given)
                after = [torch.get_rng_state().double(), *get_cuda_rng_tracker().states_.values()]
                gradients = {name: p.grad for name, p in whole.named_parameters()}
                results.append({**found, **gradients, **dict(enumerate(after))})
            kept, again, other = results
            told[kind] = [
                all(torch.equal(kept[name], again[name]) for name in kept),
                torch.equal(kept["y"], other["y"]),
            ]
    return told


@pytest.mark.parametrize("layout", ["one rank", "tp 2", "tp 2 sp", "cp 2"])
def test_recomputed_layers_drop_the_same(run_ranks: Run, layout: str) -> None:
    size, degrees = LAYOUTS[layout]
    for told in run_ranks(size)(drop_twice, degrees, ["gpt2", "post-norm", "t5"]):
        for kind, (is_same, ignores_seed) in told.items():
            assert is_same, kind
            assert not ignores_seed, kind


def agree_on_dropout(world: World, layout: dict[str, Any]) -> Tensor:
    """Return what comes out of layers with dropout, at all positions."""
    parallel = ParallelConfig(**layout)
    with megatron_grid(world, parallel):
        case = Case("t5", dropout=0.3)
        block, _ = build_block(local_layers(case), parallel, case)
        torch.manual_seed(4)
        return run_block(block, parallel, make_inputs(case))["y"]


@pytest.mark.parametrize("layout", ["tp 2", "tp 2 sp"])
def test_ranks_agree_on_the_residual_stream(run_ranks: Run, layout: str) -> None:
    size, degrees = LAYOUTS[layout]
    one, other = run_ranks(size)(agree_on_dropout, degrees)
    assert torch.equal(one, other)


def count_calls(world: World) -> dict[str, int]:
    """Return how often the two feed-forward layers run, in training and in evaluation."""
    parallel = ParallelConfig()
    told: dict[str, int] = {}
    with megatron_grid(world, parallel):
        for recompute in (False, True):
            case = Case("gpt2", recompute=recompute)
            block, _ = build_block(local_layers(case), parallel, case)
            runs: list[None] = []
            for layer in block.layers:
                # In front of it: recomputation ends with the last tensor that is kept.
                layer.mlp.register_forward_pre_hook(lambda *_, told=runs: told.append(None))
            run_block(block, parallel, make_inputs(case))
            told[f"recompute {recompute}"] = len(runs)
            runs.clear()
            x = make_inputs(case).x.transpose(0, 1).contiguous()
            block.eval()(hidden_states=x, attention_mask=None, attention_bias=make_micro())
            told[f"evaluation {recompute}"] = len(runs)
    return told


def test_recompute_runs_layers_again_in_training_alone(run_ranks: Run) -> None:
    (told,) = run_ranks(1)(count_calls)
    assert told["recompute False"] == told["evaluation False"] == told["evaluation True"] == 2
    assert told["recompute True"] == 4


def feed_forward_streams(world: World) -> list[bool]:
    """Do ranks leave the common stream alone where they drop features of their own?"""
    parallel = ParallelConfig(tensor=world.size)
    with megatron_grid(world, parallel):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        case = Case("t5", dropout=0.5)
        block, _ = build_block(local_layers(case), parallel, case)
        mlp, x = block.layers[0].mlp, draw(LENGTH, BATCH, HIDDEN, seed=1)
        streams = list(get_cuda_rng_tracker().get_states().values())
        common = torch.get_rng_state()
        first = mlp(x)[0]
        is_left = torch.equal(common, torch.get_rng_state())
        later = list(get_cuda_rng_tracker().get_states().values())
        moved = any(not torch.equal(a, b) for a, b in zip(streams, later, strict=True))
        plain = block.eval().layers[0].mlp(x)[0]
        return [is_left, moved, not torch.equal(first, plain)]


def test_feed_forward_drops_from_the_stream_of_its_rank(run_ranks: Run) -> None:
    for told in run_ranks(2)(feed_forward_streams):
        assert all(told), told
