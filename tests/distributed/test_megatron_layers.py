"""Linear layers of the Megatron engine against the local layers with the same weights."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed.megatron_comparison import (
    difference,
    differences,
    draw,
    load,
    make_config,
    whole_gradients,
)
from distributed.megatron_grid import megatron_grid
from distributed.megatron_pairs import (
    BATCH,
    LAYOUTS,
    LENGTH,
    PAIRS,
    Local,
    Pair,
    Parallel,
    local_run,
    mine,
    mpo,
)
from torch import Tensor

from mpotrain.nn.config import DenseSite
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

Ranks = Callable[[int], Callable[..., list[Any]]]


def pair_differences(
    world: World, name: str, parallel: ParallelConfig, kept: bool = False, recompute: bool = False
) -> dict[str, float]:
    """Return the differences of output, input gradient and all gradients of parameters."""
    from megatron.core.tensor_parallel import checkpoint

    from mpotrain.tensor.cached import StepCache

    pair, rank = PAIRS[name], world.rank
    local, expected, x = local_run(pair)
    cache = StepCache() if kept else None
    layers = Parallel(pair, make_config(parallel), cache, skips=pair.blocks == 1)
    load(layers, {key: p.detach() for key, p in local.named_parameters()})
    weights = draw(*expected.shape, seed=2)

    def microbatch(m: int) -> tuple[Tensor, Tensor, Tensor]:
        part = mine(x.detach()[:, m : m + 1], parallel, rank).clone().requires_grad_()
        y = checkpoint(layers, False, part) if recompute else layers(part)
        return part, y, (y * mine(weights[:, m : m + 1], parallel, rank)).sum()

    def step() -> list[tuple[Tensor, Tensor, Tensor]]:
        runs = [microbatch(m) for m in range(BATCH)]
        for _, _, loss in runs:
            loss.backward()
        return runs

    if cache is None:
        runs = step()
    else:
        with cache.step(BATCH):
            runs = step()
        assert all(matrix.num_rebuilds == 1 for matrix in cache.matrices)
        assert all(matrix.num_projections == 1 for matrix in cache.matrices)
    assert x.grad is not None
    found = differences(whole_gradients(layers), local)
    for what, tensors, whole in (
        ("output", [y.detach() for _, y, _ in runs], expected),
        ("input", [part.grad for part, _, _ in runs], x.grad),
    ):
        joined = torch.cat([t for t in tensors if t is not None], 1)
        found[what] = difference(joined, mine(whole, parallel, rank))
    return found


def all_differences(
    world: World, parallel: ParallelConfig, variants: tuple[tuple[bool, bool], ...]
) -> dict[str, float]:
    found = {}
    with megatron_grid(world, parallel):
        for name, pair in PAIRS.items():
            for kept, recompute in variants:
                if kept and pair.first.kind == pair.second.kind == "dense":
                    continue
                key = f"{name}, kept {kept}, recomputed {recompute}"
                for what, value in pair_differences(world, name, parallel, kept, recompute).items():
                    found[f"{key}: {what}"] = value
    return found


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_pairs_equal_local_layers(run_ranks: Ranks, layout: str) -> None:
    parallel = LAYOUTS[layout]
    for found in run_ranks(parallel.tensor)(all_differences, parallel, ((False, False),)):
        assert len(found) > 6 * len(PAIRS)
        assert {key: value for key, value in found.items() if not value <= 1e-12} == {}


@pytest.mark.parametrize("layout", ["tp 1", "tp 2", "tp 2, sp"])
def test_pairs_with_matrices_kept_over_microbatches(run_ranks: Ranks, layout: str) -> None:
    parallel = LAYOUTS[layout]
    variants = ((True, False), (True, True))
    for found in run_ranks(parallel.tensor)(all_differences, parallel, variants):
        assert {key: value for key, value in found.items() if not value <= 1e-12} == {}


def unsummed(world: World, parallel: ParallelConfig) -> dict[str, float]:
    """Return how far a rank's own gradients of partial parameters are from the whole ones."""
    from mpotrain.engine.megatron.placement import placement_of

    found = {}
    with megatron_grid(world, parallel):
        for name, pair in PAIRS.items():
            local, expected, x = local_run(pair)
            layers = Parallel(pair, make_config(parallel))
            load(layers, {key: p.detach() for key, p in local.named_parameters()})
            y = layers(mine(x.detach(), parallel, world.rank))
            weights = draw(*expected.shape, seed=2)
            (y * mine(weights, parallel, world.rank)).sum().backward()
            whole = {key: p.grad for key, p in local.named_parameters()}
            for parameter in layers.parameters():
                placement = placement_of(parameter)
                if placement.is_partial:
                    assert parameter.grad is not None
                    reference = whole[placement.name]
                    assert reference is not None
                    found[f"{name}: {placement.name}"] = difference(parameter.grad, reference)
    return found


@pytest.mark.parametrize("layout", ["tp 2", "tp 2, sp"])
def test_partial_gradients_are_partial(run_ranks: Ranks, layout: str) -> None:
    for found in run_ranks(2)(unsummed, LAYOUTS[layout]):
        assert len(found) > 40
        assert {key: value for key, value in found.items() if not value > 1e-3} == {}


def outlives(seen: weakref.ref[Tensor], seconds: float = 20.0) -> bool:
    """Return whether a tensor exists for long; gloo's thread lets go of it a little late."""
    deadline = time.monotonic() + seconds
    while seen() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    return seen() is not None


def gathered_after_forward(world: World, name: str) -> list[bool]:
    """Return whether a gathered input still exists after the forward, and the backward pass."""
    from mpotrain.engine.megatron import entry as module

    parallel, pair = LAYOUTS["tp 2, sp"], PAIRS[name]
    seen: list[weakref.ref[Tensor]] = []
    gather = module.gather_from_sequence_parallel_region

    def watched(x: Tensor, **given: Any) -> Tensor:
        whole: Tensor = gather(x, **given)
        seen.append(weakref.ref(whole))
        return whole

    with megatron_grid(world, parallel):
        layers = Parallel(pair, make_config(parallel))
        module.gather_from_sequence_parallel_region = watched
        try:
            y = layers(draw(LENGTH // 2, BATCH, pair.hidden, seed=1).requires_grad_())
            assert len(seen) == 1
            alive = [outlives(seen[0])]
            y.sum().backward()
            # Once more, for the matrix and its adapter together.
            assert len(seen) == 2
            alive.append(outlives(seen[1]))
        finally:
            module.gather_from_sequence_parallel_region = gather
    return alive


@pytest.mark.parametrize("name", ["3 cores, central cut", "chains", "dense", "adapters in blocks"])
def test_gathered_inputs_are_not_kept_for_backward(run_ranks: Ranks, name: str) -> None:
    assert run_ranks(2)(gathered_after_forward, name) == [[False, False]] * 2


def dtypes(world: World, kept: bool) -> dict[str, tuple[float, torch.dtype]]:
    """Return differences and dtypes of fp32 layers that are given bf16."""
    from mpotrain.tensor.cached import StepCache

    parallel, pair = LAYOUTS["tp 2, sp"], PAIRS["shared, an auxiliary cut, adapters"]
    with megatron_grid(world, parallel):
        local, expected, x = local_run(pair)
        cache = StepCache()
        layers = Parallel(pair, make_config(parallel), cache if kept else None, skips=True)
        layers.float()
        load(layers, {key: p.detach() for key, p in local.named_parameters()})
        part = mine(x.detach(), parallel, world.rank).bfloat16().requires_grad_()
        with cache.step(1):
            y = layers(part)
            weights = mine(draw(*expected.shape, seed=2), parallel, world.rank)
            (y.double() * weights).sum().backward()
        found = {"output": (difference(y, mine(expected, parallel, world.rank)), y.dtype)}
        whole = whole_gradients(layers)
        for name, parameter in local.named_parameters():
            assert parameter.grad is not None
            gap = difference(whole[name].double(), parameter.grad)
            found[name] = (gap, whole[name].dtype)
    return found


@pytest.mark.parametrize("kept", [False, True])
def test_compute_in_the_dtype_of_the_input(run_ranks: Ranks, kept: bool) -> None:
    for found in run_ranks(2)(dtypes, kept):
        assert found.pop("output")[1] == torch.bfloat16
        for name, (gap, dtype) in found.items():
            assert gap < 0.05, name
            assert dtype == torch.float32


def refusals(world: World) -> list[str]:
    """Return what is said to layers that cannot be built."""
    from distributed.megatron_comparison import make_slots
    from distributed.megatron_pairs import sources
    from megatron.core.transformer.spec_utils import build_module

    from mpotrain.engine.megatron.layers import column_linear, row_linear

    parallel = LAYOUTS["tp 2"]
    pair, said = PAIRS["3 cores, central cut"], []

    def attempt(pair: Pair, which: int, *sizes: int, **given: Any) -> None:
        tensors = {key: p.detach() for key, p in Local(pair).named_parameters()}
        source = list(sources(pair, make_slots(tensors)))[which]
        spec = row_linear(source) if which else column_linear(source)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - build_module adds to the text
            build_module(spec, *sizes, config=make_config(parallel), init_method=None, **given)
        said.append(f"{caught.type.__name__}: {caught.value}")

    with megatron_grid(world, parallel):
        attempt(pair, 0, 24, 32, gather_output=True)
        attempt(pair, 1, 32, 24, input_is_parallel=False)
        attempt(pair, 0, 24, 16)
        attempt(pair, 0, 24, 32, is_expert=True)
        attempt(pair, 0, 24, 32, stride=2)
        attempt(Pair(mpo((4, 6), (6, 6)), DenseSite(), 32, 32), 0, 24, 32)
        attempt(Pair(mpo((4, 6), (8, 4)), DenseSite(), 32, 1), 0, 24, 32)
        attempt(Pair(DenseSite(), DenseSite(), 32, 12), 1, 32, 24)
    return said


def test_what_cannot_be_built_is_refused(run_ranks: Ranks) -> None:
    texts = (
        "ValueError: first: gather_output",
        "ValueError: second: this layer takes features that are cut already",
        "ValueError: first is 24 x 32, but a layer of 24 x 16",
        "ValueError: first: is_expert",
        "ValueError: first: is_expert and stride 2",
        "ParallelError: first: the out modes [6, 6] have more than 32 features",
        "ParallelError: first: the out modes [8, 4] have none whose cut over 2",
        "ParallelError: second: 32 in features cannot be shared out over 2",
    )
    for said in run_ranks(2)(refusals):
        assert len(said) == len(texts)
        for found, wanted in zip(said, texts, strict=True):
            assert found.startswith(wanted), found
