"""Normalisations of the Megatron engine beside the local ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed.megatron_comparison import (
    draw,
    load,
    make_config,
    make_slots,
    redraw,
)
from distributed.megatron_grid import megatron_grid
from distributed.megatron_layer_cases import (
    BATCH,
    HIDDEN,
    LENGTH,
)

from mpotrain.nn.norm import LayerNorm
from mpotrain.nn.t5_block import RMSNorm
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

Run = Callable[[int], Callable[..., list[Any]]]


def norm_bits(world: World, dtype: torch.dtype) -> list[bool]:
    with megatron_grid(world, ParallelConfig()):
        from megatron.core.transformer.spec_utils import build_module

        from mpotrain.engine.megatron.norm import norm
        from mpotrain.engine.megatron.sources import NormSource

        found = []
        for local in (LayerNorm(HIDDEN, eps=1e-3), RMSNorm(HIDDEN, 1e-3)):
            redraw(local).to(dtype)
            tensors = dict(local.named_parameters())
            slots = make_slots(tensors, dtype=dtype)
            bias = "bias" if "bias" in tensors else None
            module = build_module(
                norm(NormSource(slots, "weight", bias, 1e-3)),
                config=make_config(ParallelConfig()),
                hidden_size=HIDDEN,
                eps=0.5,
            )
            load(module, tensors)
            x = 3 * draw(LENGTH, BATCH, HIDDEN, seed=1, dtype=dtype) + 1
            one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = module(one), local(other)
            y.sum().backward()
            expected.sum().backward()
            assert y.dtype == dtype
            assert one.grad is not None
            assert other.grad is not None
            found += [torch.equal(y, expected), torch.equal(one.grad, other.grad)]
            found += [torch.equal(module.weight.grad, local.weight.grad)]
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_equal_the_local_ones_bit_for_bit(run_ranks: Run, dtype: torch.dtype) -> None:
    for found in run_ranks(1)(norm_bits, dtype):
        assert all(found), found
