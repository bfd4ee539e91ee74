"""Two transformer layers of every kind: local ones, and a block of the Megatron engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from distributed.megatron_comparison import (
    DOUBLE,
    Sequences,
    document_ids,
    draw,
    linear_source,
    load,
    make_config,
    make_micro,
    make_slots,
    redraw,
)
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.nn.attention import CausalSelfAttention, document_mask
from mpotrain.nn.block import Block, FeedForward
from mpotrain.nn.encoder_block import EncoderBlock
from mpotrain.nn.linear import DenseLinear
from mpotrain.nn.t5_block import RMSNorm, T5Attention, T5Block, T5FeedForward
from mpotrain.nn.t5_stack import hide
from mpotrain.parallel.plan import ParallelConfig

BATCH, LENGTH, SOURCE = 2, 16, 8
HIDDEN, HEADS, HEAD, FFN, EPS = 16, 8, 2, 24, 1e-5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp 2": (2, {"tensor": 2}),
    "tp 4": (4, {"tensor": 4}),
    "tp 2 sp": (2, {"tensor": 2, "sequence": True}),
    "tp 4 sp": (4, {"tensor": 4, "sequence": True}),
    "cp 2": (2, {"context": 2}),
    "tp 2 sp cp 2": (4, {"tensor": 2, "sequence": True, "context": 2}),
}


@dataclass(frozen=True)
class Case:
    """Two layers and how they are run.

    Attributes:
        kind: gpt2, post-norm or pre-norm encoder, or t5 (decoder).
        documents: whether rows hold several documents.
        recompute: compute the layers again in the backward pass.
        shared: use the weights of one layer in both.
        dropout: rate of everything that is dropped.
    """

    kind: str
    documents: bool = False
    recompute: bool = False
    shared: bool = False
    dropout: float = 0.0


class WideRMSNorm(RMSNorm):
    """The local normalisation computes in fp32 whatever it is given: too coarse for a test."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def dense(*sizes: int, bias: bool = True) -> DenseLinear:
    return DenseLinear(*sizes, bias=bias, std=1.0)


def local_layer(kind: str) -> nn.Module:
    if kind == "gpt2":
        attention = CausalSelfAttention(
            dense(HIDDEN, 3 * HIDDEN), dense(HIDDEN, HIDDEN), num_heads=HEADS, dropout=0.0
        )
        ffn = FeedForward(dense(HIDDEN, FFN), dense(FFN, HIDDEN))
        return Block(attention, ffn, hidden_size=HIDDEN, dropout=0.0)
    if kind == "t5":
        return t5_layer()
    families = ("query", "key", "value", "attention_out")
    layers: dict[str, Any] = {family: dense(HIDDEN, HIDDEN) for family in families}
    layers |= {"c_fc": dense(HIDDEN, FFN), "c_proj": dense(FFN, HIDDEN)}
    return EncoderBlock(
        layers,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        activation_name="gelu",
        is_post_norm=kind == "post-norm",
        owns_norms=True,
        norm_eps=EPS,
        dropout=0.0,
        attention_dropout=0.0,
        residual_scale=1.7,
    )


def t5_layer() -> T5Block:
    def attention() -> T5Attention:
        four = [dense(HIDDEN, HIDDEN, bias=False) for _ in range(4)]
        return T5Attention(*four, num_heads=HEADS, dropout=0.0)

    ffn = T5FeedForward(dense(HIDDEN, FFN, bias=False), dense(FFN, HIDDEN, bias=False), dropout=0.0)
    block = T5Block(attention(), attention(), ffn, hidden_size=HIDDEN, eps=EPS, dropout=0.0)
    for name in ("norm_1", "norm_cross", "norm_2"):
        setattr(block, name, WideRMSNorm(HIDDEN, EPS))
    return block


def local_layers(case: Case) -> nn.ModuleList:
    count = 1 if case.shared else 2
    layers = nn.ModuleList(local_layer(case.kind) for _ in range(count))
    redraw(layers, std=0.25)
    return layers


def sources(case: Case, slots: Any, number: int) -> Any:
    """The source of a layer by the parameter names of the local one."""
    from mpotrain.engine.megatron.sources import (
        AttentionSource,
        FeedForwardSource,
        LayerSource,
        NormSource,
    )

    prefix = f"{0 if case.shared else number}."
    is_t5, is_gpt2 = case.kind == "t5", case.kind == "gpt2"

    def linear(name: str, rows: int, columns: int) -> Any:
        # Of every two heads a rank has one on two ranks: not the usual blocks.
        period = FFN if FFN in (rows, columns) else HIDDEN // 2
        return linear_source(slots, prefix + name, (rows, columns), period, bias=not is_t5)

    def normalise(name: str) -> Any:
        bias = None if is_t5 else f"{prefix}{name}.bias"
        return NormSource(slots, f"{prefix}{name}.weight", bias, EPS)

    def attention(name: str, causal: bool) -> Any:
        names = ("qkv",) if is_gpt2 else ("query", "key", "value")
        columns = 3 * HIDDEN if is_gpt2 else HIDDEN
        projections = tuple(linear(f"{name}.{part}", HIDDEN, columns) for part in names)
        out = linear(f"{name}.out", HIDDEN, HIDDEN)
        return AttentionSource(projections, out, causal, scale=1.0 if is_t5 else None)

    between = {"gpt2": "gelu_tanh", "t5": "relu"}.get(case.kind, "gelu")
    first, second = ("norm_1", "norm_2") if is_gpt2 or is_t5 else ("attention_norm", "ffn_norm")
    return LayerSource(
        attention=attention("attention", causal=is_gpt2 or is_t5),
        norm_1=normalise(first),
        norm_2=normalise(second),
        ffn=FeedForwardSource(
            linear("ffn.c_fc", HIDDEN, FFN),
            linear("ffn.c_proj", FFN, HIDDEN),
            between,  # type: ignore[arg-type]
            case.dropout if is_t5 else 0.0,
        ),
        cross_attention=attention("cross_attention", causal=False) if is_t5 else None,
        norm_cross=normalise("norm_cross") if is_t5 else None,
        is_post_norm=case.kind == "post-norm",
        residual_scale=1.0 if is_gpt2 or is_t5 else 1.7,
        recompute=case.recompute,
    )


def build_block(local: nn.Module, parallel: ParallelConfig, case: Case) -> tuple[Any, Any]:
    """The block of two layers, and the bank of what they share."""
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
    )

    from mpotrain.engine.megatron.layer import layer_spec

    tensors = dict(local.named_parameters())
    slots = make_slots(tensors, shared=tensors if case.shared else ())
    config = make_config(
        parallel,
        num_layers=2,
        add_bias_linear=case.kind != "t5",
        hidden_dropout=case.dropout,
        attention_dropout=case.dropout,
    )
    specs = [layer_spec(sources(case, slots, number)) for number in range(2)]
    block = TransformerBlock(
        config, TransformerBlockSubmodules(layer_specs=specs), post_layer_norm=False
    )
    whole = nn.ModuleList([block, slots.bank])
    load(whole, tensors)
    return block, whole


@dataclass
class Inputs:
    """What goes into the layers, over whole sequences, and the gradient of what comes out."""

    x: Tensor
    memory: Tensor
    upstream: Tensor
    seen: Tensor | None
    terms: Tensor | None
    memory_terms: Tensor | None


def make_inputs(case: Case) -> Inputs:
    ids = document_ids(BATCH, LENGTH)
    everywhere = torch.ones_like(ids)
    seen = document_mask(ids, ids) if case.documents else document_mask(everywhere, everywhere)
    if case.kind in ("gpt2", "t5"):
        seen = seen.tril()
    terms = memory_terms = None
    if case.kind == "t5":
        terms = hide(draw(1, HEADS, LENGTH, LENGTH, seed=5), seen)
    if case.kind == "t5" and case.documents:
        back = document_mask(ids, document_ids(BATCH, SOURCE))
        memory_terms = hide(torch.zeros(back.shape, dtype=DOUBLE), back)
    return Inputs(
        x=draw(BATCH, LENGTH, HIDDEN, seed=1),
        memory=draw(BATCH, SOURCE, HIDDEN, seed=2),
        upstream=draw(BATCH, LENGTH, HIDDEN, seed=3),
        seen=seen if case.documents and case.kind != "t5" else None,
        terms=terms,
        memory_terms=memory_terms,
    )


def run_local(local: nn.ModuleList, case: Case, given: Inputs) -> dict[str, Tensor]:
    x, memory = given.x.clone().requires_grad_(), given.memory.clone().requires_grad_()
    terms = None if given.terms is None else given.terms.clone().requires_grad_()
    y = x
    for number in range(2):
        layer = local[0 if case.shared else number]
        if case.kind == "t5":
            y = layer(y, terms, memory, given.memory_terms)[0]
        elif case.kind == "gpt2":
            y = layer(y, given.seen)[0]
        else:
            y = layer(y, given.seen, {})
    (y * given.upstream).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "memory": memory.grad}
    found["terms"] = None if terms is None else terms.grad
    return {name: value for name, value in found.items() if value is not None}


def run_block(block: Any, parallel: ParallelConfig, given: Inputs) -> dict[str, Tensor]:
    """Run the block on this rank's part of the inputs; gradients add up in its parameters."""
    from megatron.core import parallel_state

    from mpotrain.engine.megatron.placement import Cut

    ranks = Sequences(parallel)
    rank = parallel_state.get_tensor_model_parallel_rank()
    heads = Cut(1, parallel.tensor, rank, period=HEADS // 2)
    x = ranks.mine(given.x).requires_grad_()
    memory = ranks.mine(given.memory).requires_grad_()
    terms = None if given.terms is None else heads.take(given.terms).clone().requires_grad_()
    micro = make_micro(seen=given.seen, terms=terms, memory_terms=given.memory_terms)
    context = None if given.terms is None else ranks.enter(memory)
    y = block(
        hidden_states=ranks.enter(x), attention_mask=None, context=context, attention_bias=micro
    )
    micro.tally.is_open = False
    y = ranks.leave(y)
    (y * ranks.mine(given.upstream)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "memory": memory.grad}
    if terms is not None and terms.grad is not None:
        dist.all_reduce(terms.grad, group=parallel_state.get_context_parallel_group())
        found["terms"] = terms.grad
    return {name: value for name, value in found.items() if value is not None}
