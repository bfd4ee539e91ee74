"""Attention of the Megatron engine beside the local one: heads and positions cut over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.megatron_bytes import counting
from distributed.megatron_comparison import (
    DOUBLE,
    Sequences,
    difference,
    differences,
    document_ids,
    draw,
    linear_source,
    load,
    make_config,
    make_micro,
    make_slots,
    redraw,
    whole_gradients,
)
from distributed.megatron_grid import megatron_grid
from torch import Tensor, nn

from mpotrain.nn.attention import CausalSelfAttention, document_mask
from mpotrain.nn.linear import DenseLinear
from mpotrain.nn.t5_block import T5Attention
from mpotrain.nn.t5_stack import hide
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

Run = Callable[[int], Callable[..., list[Any]]]
BATCH, LENGTH, SOURCE = 3, 16, 8
HIDDEN, HEADS, HEAD = 16, 8, 2
WIDE = 3  # head size where heads together are wider than hidden states
TOLERANCE = 1e-11
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp 2": (2, {"tensor": 2}),
    "tp 4": (4, {"tensor": 4}),
    "tp 2 sp": (2, {"tensor": 2, "sequence": True}),
    "tp 4 sp": (4, {"tensor": 4, "sequence": True}),
    "cp 2": (2, {"context": 2}),
    "cp 4": (4, {"context": 4}),
    "tp 2 sp cp 2": (4, {"tensor": 2, "sequence": True, "context": 2}),
}


@dataclass(frozen=True)
class Case:
    """What the attention is like.

    Attributes:
        kind: fused (GPT-2), separate (T5 within a stack) or cross (T5 to its encoder).
        mask: None, "documents", "terms" or "row terms" (the same for all queries).
        period: of the features of the heads, in heads.
    """

    kind: str
    mask: str | None = None
    period: int = HEADS
    causal: bool = True


def local_attention(kind: str) -> nn.Module:
    if kind == "fused":
        layers = [
            DenseLinear(*sizes, bias=True, std=1.0)
            for sizes in ((HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN))
        ]
        return redraw(CausalSelfAttention(*layers, num_heads=HEADS, dropout=0.0))
    inner = HEADS * WIDE
    three = [DenseLinear(HIDDEN, inner, bias=False, std=1.0) for _ in range(3)]
    out = DenseLinear(inner, HIDDEN, bias=False, std=1.0)
    return redraw(T5Attention(*three, out, num_heads=HEADS, dropout=0.0))


def build_attention(local: nn.Module, parallel: ParallelConfig, case: Case, **sizes: Any) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    from mpotrain.engine.megatron.attention import cross_attention, self_attention
    from mpotrain.engine.megatron.sources import AttentionSource

    tensors = dict(local.named_parameters())
    slots = make_slots(tensors)
    fused = case.kind == "fused"
    head = HEAD if fused else WIDE
    period, inner = case.period * head, HEADS * head

    def linear(name: str, rows: int, columns: int) -> Any:
        return linear_source(slots, name, (rows, columns), period, bias=fused)

    names = ("qkv",) if fused else ("query", "key", "value")
    columns = 3 * inner if fused else inner
    projections = tuple(linear(name, HIDDEN, columns) for name in names)
    scale = None if fused else 1.0
    source = AttentionSource(projections, linear("out", inner, HIDDEN), case.causal, scale)
    build = cross_attention if case.kind == "cross" else self_attention
    config = make_config(parallel, kv_channels=head, add_bias_linear=fused, **sizes)
    module = build_module(build(source), config=config, layer_number=1)
    load(module, tensors)
    return module


def heads_of_rank(case: Case, parallel: ParallelConfig) -> Any:
    from megatron.core import parallel_state

    from mpotrain.engine.megatron.placement import Cut

    rank = parallel_state.get_tensor_model_parallel_rank()
    return Cut(1, parallel.tensor, rank, period=case.period)


def masks(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """What is seen, and what is added to the scores, over whole sequences."""
    keys = SOURCE if case.kind == "cross" else LENGTH
    rows = 1 if case.mask == "row terms" else LENGTH
    ids = document_ids(BATCH, LENGTH)
    seen = document_mask(ids, ids)
    if case.causal:
        seen = seen.tril()
    if case.mask == "documents":
        return seen, None
    if case.mask is None:
        return None, None
    terms = draw(1, HEADS, rows, keys, seed=5)
    return None, terms if case.kind == "cross" else hide(terms, seen)


def run_local(local: nn.Module, case: Case, x: Tensor, memory: Tensor, mask: Any) -> Tensor:
    if isinstance(local, CausalSelfAttention):
        result: Tensor = local(x, mask)
    else:
        result = local(x, memory if case.kind == "cross" else x, mask)
    return result


def compare(
    world: World, layout: dict[str, Any], cases: dict[str, Case], is_training: bool = True
) -> dict[str, dict[str, float]]:
    """Differences of output and all gradients from the local attention, of each case."""
    parallel = ParallelConfig(**layout)
    with megatron_grid(world, parallel):
        return {name: errors(parallel, case, is_training) for name, case in cases.items()}


def errors(parallel: ParallelConfig, case: Case, is_training: bool) -> dict[str, float]:
    local = local_attention(case.kind)
    seen, terms = masks(case)
    x = draw(BATCH, LENGTH, HIDDEN, seed=1).requires_grad_()
    memory = draw(BATCH, SOURCE, HIDDEN, seed=2).requires_grad_()
    upstream = draw(BATCH, LENGTH, HIDDEN, seed=3)
    term = None if terms is None else terms.clone().requires_grad_()
    expected = run_local(local, case, x, memory, seen if term is None else term)
    (expected * upstream).sum().backward()

    ranks = Sequences(parallel)
    module = build_attention(local, parallel, case).train(is_training)
    mine = ranks.mine(x.detach()).requires_grad_()
    source = ranks.mine(memory.detach()).requires_grad_()
    cut = heads_of_rank(case, parallel)
    own = None if terms is None else cut.take(terms).clone().requires_grad_()
    kind = "memory_terms" if case.kind == "cross" else "terms"
    micro = make_micro(seen=seen, **{kind: own})
    given = {"key_value_states": ranks.enter(source)} if case.kind == "cross" else {}
    y, bias = module(ranks.enter(mine), None, attention_bias=micro, **given)
    y = ranks.leave(y if bias is None else y + bias)
    (y * ranks.mine(upstream)).sum().backward()

    assert x.grad is not None
    assert mine.grad is not None
    result = {
        "y": difference(y.detach(), ranks.mine(expected.detach())),
        "x": difference(mine.grad, ranks.mine(x.grad)),
        **differences(whole_gradients(module), local),
    }
    if case.kind == "cross":
        assert memory.grad is not None
        assert source.grad is not None
        result["memory"] = difference(source.grad, ranks.mine(memory.grad))
    if term is not None:
        assert own is not None
        assert own.grad is not None
        assert term.grad is not None
        dist.all_reduce(own.grad, group=context_group())
        result["terms"] = difference(own.grad, cut.take(term.grad))
    return result


def context_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def sent(world: World, layout: dict[str, Any], kind: str) -> dict[str, float]:
    """Return what one forward and backward pass sends, in hidden states of a whole sequence."""
    parallel = ParallelConfig(**layout)
    with megatron_grid(world, parallel):
        ranks, case = Sequences(parallel), Case(kind, causal=False)
        module = build_attention(local_attention(kind), parallel, case)
        x, memory = (
            ranks.enter(ranks.mine(draw(BATCH, rows, HIDDEN, seed=1))).requires_grad_()
            for rows in (LENGTH, SOURCE)
        )
        given = {"key_value_states": memory} if kind == "cross" else {}
        with counting() as bytes_sent:
            module(x, None, attention_bias=make_micro(), **given)[0].sum().backward()
        states = BATCH * LENGTH * HIDDEN * 8 * (world.size - 1) / world.size
        return {
            name: bytes_sent.of("tensor", kinds=[name]) / states for name in ("gather", "reduce")
        }


@pytest.mark.parametrize("kind", ["fused", "separate", "cross"])
def test_an_input_is_communicated_once_for_all_projections(run_ranks: Run, kind: str) -> None:
    read = 1 + SOURCE / LENGTH if kind == "cross" else 1
    # Besides, the products of the row-parallel layer are summed, in parts or on every rank.
    for told in run_ranks(2)(sent, LAYOUTS["tp 2 sp"][1], kind):
        assert told == {"gather": 2 * read + 1, "reduce": read + 1}
    for told in run_ranks(2)(sent, LAYOUTS["tp 2"][1], kind):
        assert told == {"gather": 0, "reduce": 2 * read + 2}


CASES = {
    "causal": Case("fused"),
    "interleaved heads": Case("fused", period=4),
    "documents": Case("fused", "documents"),
    "terms": Case("separate", "terms", period=4, causal=False),
    "causal terms": Case("separate", "terms"),
    "all seen": Case("separate", causal=False),
    "cross": Case("cross", causal=False),
    "cross terms": Case("cross", "terms", period=4, causal=False),
    "cross row terms": Case("cross", "row terms", causal=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_equals_the_local_one(run_ranks: Run, layout: str) -> None:
    size, degrees = LAYOUTS[layout]
    for told in run_ranks(size)(compare, degrees, CASES):
        for name, found in told.items():
            assert max(found.values()) < TOLERANCE, (name, found)


def test_evaluation_hands_the_masks_through(run_ranks: Run) -> None:
    cases = {name: CASES[name] for name in ("documents", "cross terms")}
    for told in run_ranks(2)(compare, {"context": 2}, cases, False):
        for name, found in told.items():
            assert max(found.values()) < TOLERANCE, (name, found)


def test_documents_and_order_of_positions_matter(run_ranks: Run) -> None:
    """The comparison above notices another mask."""
    causal = run_ranks(2)(output_of, {"context": 2}, CASES["causal"])
    documents = run_ranks(2)(output_of, {"context": 2}, CASES["documents"])
    everything = run_ranks(2)(output_of, {"context": 2}, Case("fused", causal=False))
    for one, other, third in zip(causal, documents, everything, strict=True):
        assert difference(one, other) > 1e-2
        assert difference(one, third) > 1e-2


def train_after_evaluation(world: World) -> dict[str, float]:
    """Evaluate first, in inference mode, from where no tensor may reach autograd."""
    parallel = ParallelConfig(context=world.size)
    with megatron_grid(world, parallel):
        from mpotrain.engine.megatron import core_attention

        core_attention.positions_of_rank.cache_clear()
        core_attention._natural_order.cache_clear()
        case = CASES["documents"]
        module = build_attention(local_attention(case.kind), parallel, case)
        with torch.inference_mode():
            x = Sequences(parallel).mine(draw(BATCH, LENGTH, HIDDEN, seed=1))
            module(x, None, attention_bias=make_micro(seen=masks(case)[0]))
        return errors(parallel, case, is_training=True)


def test_training_after_evaluation_in_inference_mode(run_ranks: Run) -> None:
    for found in run_ranks(2)(train_after_evaluation):
        assert max(found.values()) < TOLERANCE, found


def output_of(world: World, layout: dict[str, Any], case: Case) -> Tensor:
    parallel = ParallelConfig(**layout)
    with megatron_grid(world, parallel):
        ranks = Sequences(parallel)
        module = build_attention(local_attention(case.kind), parallel, case)
        micro = make_micro(seen=masks(case)[0])
        x = ranks.mine(draw(BATCH, LENGTH, HIDDEN, seed=1))
        y: Tensor = module(x, None, attention_bias=micro)[0]
        return y.detach()


def dropped(world: World, layout: dict[str, Any]) -> tuple[Tensor, Tensor, bool, bool]:
    """Core attention of the same heads on all ranks, and what two forward passes draw."""
    parallel = ParallelConfig(**layout)
    with megatron_grid(world, parallel):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker
        from megatron.core.transformer.enums import AttnMaskType

        from mpotrain.engine.megatron.core_attention import FusedCoreAttention

        config = make_config(parallel, attention_dropout=0.5)
        core = FusedCoreAttention(config, 1, AttnMaskType.causal, "self")
        query, key, value = (draw(LENGTH, BATCH, 2, HEAD, seed=n) for n in range(3))
        torch.manual_seed(3)
        streams = get_cuda_rng_tracker().get_states()
        first = core(query, key, value, attention_bias=make_micro())
        default = torch.rand(4, dtype=DOUBLE)
        second = core(query, key, value, attention_bias=make_micro())
        get_cuda_rng_tracker().set_states(streams)
        torch.manual_seed(3)
        again = core(query, key, value, attention_bias=make_micro())
        plain = core.eval()(query, key, value, attention_bias=make_micro())
        repeated = bool(torch.equal(first, again)) and not torch.equal(first, second)
        return first, default, repeated, bool(torch.equal(first, plain))


def test_ranks_drop_different_heads_and_keep_the_common_stream(run_ranks: Run) -> None:
    one, other = run_ranks(2)(dropped, {"tensor": 2})
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    for told in (one, other):
        assert told[2]
        assert not told[3]


def other_core(world: World) -> tuple[Any, ...]:
    from megatron.core.transformer.spec_utils import build_module

    parallel = ParallelConfig()
    with megatron_grid(world, parallel):
        from mpotrain.engine.megatron.attention import self_attention
        from mpotrain.engine.megatron.sources import AttentionSource

        told: dict[str, Any] = {}

        class Core(nn.Module):
            def __init__(self, **given: Any) -> None:
                super().__init__()
                told.update(given)

            def forward(self, query: Tensor, *_: Any, **given: Any) -> Tensor:
                told.update(given)
                return query.flatten(2)

        slots = make_slots(dict(local_attention("fused").named_parameters()))
        qkv = linear_source(slots, "qkv", (HIDDEN, 3 * HIDDEN), HIDDEN)
        out = linear_source(slots, "out", (HIDDEN, HIDDEN), HIDDEN)
        spec = self_attention(AttentionSource((qkv,), out, True, scale=0.25), Core)
        module = build_module(spec, config=make_config(parallel), layer_number=3)
        micro = make_micro()
        module(draw(LENGTH, BATCH, HIDDEN, seed=1), None, attention_bias=micro)
        return (
            told["softmax_scale"],
            told["layer_number"],
            told["attention_type"],
            told["attn_mask_type"].name,
            told["attention_bias"] is micro,
        )


def test_another_core_attention_gets_the_scale_and_the_micro_batch(run_ranks: Run) -> None:
    assert run_ranks(1)(other_core) == [(0.25, 3, "self", "causal", True)]
