"""Linear layers of the Megatron engine inside of Megatron-core's own modules and wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from distributed.megatron_comparison import (
    difference,
    differences,
    draw,
    load,
    make_config,
    make_slots,
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
    sources,
)
from torch import Tensor, nn

from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

Ranks = Callable[[int], Callable[..., list[Any]]]


def stock_mlp(world: World, parallel: ParallelConfig) -> dict[str, float]:
    """Return the differences of Megatron-core's own MLP around these layers."""
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    from mpotrain.engine.megatron.layers import column_linear, row_linear

    pair = PAIRS["3 cores, central cut"]
    with megatron_grid(world, parallel):
        local, expected, x = local_run(pair)
        tensors = {key: p.detach() for key, p in local.named_parameters()}
        first, second = sources(pair, make_slots(tensors))
        config = make_config(parallel, hidden_size=pair.hidden, ffn_hidden_size=pair.features)
        parts = MLPSubmodules(linear_fc1=column_linear(first), linear_fc2=row_linear(second))
        module = build_module(
            ModuleSpec(MLP, submodules=parts), config=config, ffn_hidden_size=pair.features
        )
        load(module, tensors)
        part = mine(x.detach(), parallel, world.rank).clone().requires_grad_()
        y, bias = module(part)
        y = y + bias
        weights = draw(*expected.shape, seed=2)
        (y * mine(weights, parallel, world.rank)).sum().backward()
        module.backward_dw()
        found = differences(whole_gradients(module), local)
        assert x.grad is not None
        assert part.grad is not None
        found["output"] = difference(y.detach(), mine(expected, parallel, world.rank))
        found["input"] = difference(part.grad, mine(x.grad, parallel, world.rank))
        with pytest.raises(NotImplementedError, match="by logical name"):
            module.sharded_state_dict()
    return found


@pytest.mark.parametrize("layout", ["tp 1", "tp 2", "tp 4, sp"])
def test_in_stock_mlp(run_ranks: Ranks, layout: str) -> None:
    parallel = LAYOUTS[layout]
    for found in run_ranks(parallel.tensor)(stock_mlp, parallel):
        assert {key: value for key, value in found.items() if not value <= 1e-12} == {}


HEADS, HEAD_SIZE = 4, 4


def stock_attention(world: World, parallel: ParallelConfig) -> dict[str, float]:
    """Return the differences of Megatron-core's own self-attention around these layers.

    There the features of the fused layer are [heads, 3, head size]: contiguous blocks are cut.
    """
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from torch.nn import functional

    from mpotrain.engine.megatron.layers import column_linear, row_linear

    hidden = HEADS * HEAD_SIZE
    pair = Pair(mpo((4, 4), (12, 4)), mpo((4, 4), (4, 4)), hidden, hidden, blocks=3, hidden=hidden)
    local = Local(pair)
    site, out = pair.sites()
    x = draw(LENGTH, BATCH, hidden, seed=1).requires_grad_()
    qkv = local.linear(site, x).view(LENGTH, BATCH, HEADS, 3, HEAD_SIZE).permute(3, 1, 2, 0, 4)
    heads = functional.scaled_dot_product_attention(*qkv, is_causal=True)
    expected = local.linear(out, heads.permute(2, 0, 1, 3).reshape(LENGTH, BATCH, hidden))
    weights = draw(*expected.shape, seed=2)
    (expected * weights).sum().backward()
    tensors = {key: p.detach() for key, p in local.named_parameters()}
    with megatron_grid(world, parallel):
        slots = make_slots(tensors)
        first, second = sources(pair, slots)
        first = type(first)(slots, site, 3 * hidden, bias="first.bias")
        config = make_config(parallel, hidden_size=hidden, num_attention_heads=HEADS)
        parts = SelfAttentionSubmodules(
            linear_qkv=column_linear(first),
            core_attention=DotProductAttention,
            linear_proj=row_linear(second),
        )
        module = build_module(
            ModuleSpec(
                SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=parts
            ),
            config=config,
            layer_number=1,
        )
        load(module, tensors)
        part = mine(x.detach(), parallel, world.rank).clone().requires_grad_()
        y, bias = module(part, attention_mask=None)
        y = y + bias
        (y * mine(weights, parallel, world.rank)).sum().backward()
        found = differences(whole_gradients(module), local)
        assert x.grad is not None
        assert part.grad is not None
        found["output"] = difference(y.detach(), mine(expected.detach(), parallel, world.rank))
        found["input"] = difference(part.grad, mine(x.grad, parallel, world.rank))
    return found


@pytest.mark.parametrize("layout", ["tp 1", "tp 2, sp", "tp 4"])
def test_in_stock_self_attention(run_ranks: Ranks, layout: str) -> None:
    parallel = LAYOUTS[layout]
    for found in run_ranks(parallel.tensor)(stock_attention, parallel):
        assert {key: value for key, value in found.items() if not value <= 1e-12} == {}


class Stack(nn.Module):
    """Some pairs, one behind the other; those after the first use the cores of the first."""

    def __init__(self, pairs: list[Parallel], recompute: bool) -> None:
        super().__init__()
        self.pairs, self.recompute = nn.ModuleList(pairs), recompute

    def forward(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import checkpoint

        for pair in self.pairs:
            x = checkpoint(pair, False, x) if self.recompute else pair(x)
        return x


def reduced_gradients(
    world: World, overlap: bool, recompute: bool, kept: bool, ahead: int
) -> dict[str, Tensor]:
    """Return what Megatron-core's data-parallel wrapper sums over two steps of 3 micro-batches."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from mpotrain.engine.megatron.placement import placement_of
    from mpotrain.tensor.cached import StepCache

    pair, found = PAIRS["3 cores, central cut"], {}
    with megatron_grid(world, ParallelConfig()):
        config, cache = make_config(ParallelConfig()), StepCache()
        local = Local(pair)
        tensors = {key: p.detach() for key, p in local.named_parameters()}
        shared = Parallel.repeated(pair, config, cache if kept else None, count=2)
        stack = Stack(shared, recompute)
        load(stack, tensors)
        wrapped = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=100),
            stack,
        )
        for step in range(2):
            wrapped.zero_grad_buffer()
            with cache.step(3):
                _run_step(wrapped, pair, seed=100 * step + 10 * world.rank, ahead=ahead)
            wrapped.finish_grad_sync()
            for parameter in stack.parameters():
                name = placement_of(parameter).name
                found[f"step {step}: {name}"] = parameter.main_grad.clone()
        if kept:
            assert all(m.num_rebuilds == m.num_projections == 2 for m in cache.matrices)
            assert len(cache.matrices) == 2
    return found


def _run_step(wrapped: Any, pair: Pair, seed: int, ahead: int) -> None:
    """Run 3 micro-batches as a pipeline stage does, `ahead` forward passes before a backward."""
    waiting: list[Tensor] = []

    def backward(is_last: bool) -> None:
        loss = waiting.pop(0)
        if is_last:
            loss.backward()
            return
        with wrapped.no_sync():
            loss.backward()

    for m in range(3):
        x = draw(LENGTH, BATCH, pair.hidden, seed=seed + m).requires_grad_()
        waiting.append((wrapped(x) ** 2).sum())
        if len(waiting) == ahead:
            backward(is_last=m == 2 and ahead == 1)
    while waiting:
        backward(is_last=len(waiting) == 1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_kept_matrices_under_the_data_parallel_wrapper(
    run_ranks: Ranks, overlap: bool, recompute: bool
) -> None:
    expected = run_ranks(2)(reduced_gradients, False, False, False, 1)[0]
    assert len(expected) == 2 * 8
    for found in run_ranks(2)(reduced_gradients, overlap, recompute, True, 2):
        for name, whole in expected.items():
            assert difference(found[name], whole) <= 1e-12, name
