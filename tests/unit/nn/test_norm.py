"""Layer normalisation: fp32 inside, the dtype of x outside."""

from __future__ import annotations

import torch

from mpotrain.nn.norm import LayerNorm, layer_norm


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    spread = wide.var(-1, unbiased=False, keepdim=True) + eps
    return (wide - wide.mean(-1, keepdim=True)) / spread.sqrt() * weight.double() + bias.double()


def test_values_in_every_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(5, 7, 16, generator=generator)
    weight, bias = torch.randn(2, 16, generator=generator)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        got = layer_norm(x.to(dtype), weight, bias, 0.1)
        assert got.dtype == dtype
        wanted = by_hand(x.to(dtype), weight, bias, 0.1)
        # One rounding at the end: all arithmetic is wider than bf16.
        error = (got.double() - wanted).abs() / wanted.abs().clamp_min(1e-2)
        limits = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2**-8}
        assert float(error.max()) <= limits[dtype] * 1.001


def test_module_has_the_eps_and_the_weights_it_was_given() -> None:
    module = LayerNorm(8, eps=0.5)
    x = torch.randn(3, 8)
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
    assert torch.equal(module(x), layer_norm(x, module.weight, module.bias, 0.5))
    assert not torch.allclose(module(x), layer_norm(x, module.weight, module.bias, 1e-5))
