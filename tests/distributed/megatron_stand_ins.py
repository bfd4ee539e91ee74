"""Stand-ins for transformer-engine and apex that run on CPU and keep to the same contracts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

USED: Counter[str] = Counter()
"""Calls of each stand-in inside `stand_ins`."""


class Attention(nn.Module):
    """Contract of megatron-core 0.16's `TEDotProductAttention`, with the scores written out."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = "p2p",
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        assert layer_number >= 1
        assert attention_type == "self"
        assert cp_comm_type in (None, "p2p")
        self.heads = config.num_attention_heads // pg_collection.tp.size()
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        num_splits: int | None = None,
    ) -> Tensor:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        assert query.shape[2] == self.heads
        assert attention_mask is attention_bias is packed_seq_params is num_splits is None
        USED["attention"] += 1
        mine = held = torch.arange(len(query))
        if self.group is not None:
            ranks, rank = self.group.size(), self.group.rank()
            chunks = torch.arange(len(query) * ranks).view(2 * ranks, -1)
            zigzag = [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(ranks)]
            mine, held = zigzag[rank], torch.cat(zigzag)
            both = torch.stack([key, value], -1)
            both = gather_from_sequence_parallel_region(both, group=self.group)
            key, value = both.unbind(-1)
        scores = torch.einsum("tbhd,sbhd->bhts", query, key).float() * self.scale
        assert attn_mask_type.name in ("causal", "no_mask")
        if attn_mask_type.name == "causal":
            scores = scores.masked_fill(mine[:, None] < held, float("-inf"))
        mixed = torch.einsum("bhts,sbhd->tbhd", scores.softmax(-1).to(value.dtype), value)
        return mixed.flatten(2)


class _Normalise(torch.autograd.Function):
    """As in transformer-engine the gains are read from the module in the backward pass, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, *parameters: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module.compute(x, *parameters)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        inputs = [t.detach().requires_grad_() for t in (x, *ctx.module.parameters())]
        with torch.enable_grad():
            y = ctx.module.compute(*inputs)
        of_x, *others = torch.autograd.grad(y, inputs, gradient)
        return of_x, None, *others


class _Kernel(nn.Module):
    def __init__(self, size: int, eps: float, dtype: torch.dtype, *, has_bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        if has_bias:
            self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        wide, shape = x.float(), weight.shape
        if bias is None:
            return functional.rms_norm(wide, shape, weight.float(), self.eps).to(x.dtype)
        normal = functional.layer_norm(wide, shape, weight.float(), bias.float(), self.eps)
        return normal.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.weight.dtype
        USED["rms_norm" if len(list(self.parameters())) == 1 else "layer_norm"] += 1
        result: Tensor = _Normalise.apply(x, self, *self.parameters())
        return result


class Norm:
    """Contract of megatron-core's `TENorm`."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> Any:
        assert config.normalization in ("LayerNorm", "RMSNorm")
        has_bias = config.normalization == "LayerNorm"
        return _Kernel(hidden_size, eps, config.params_dtype, has_bias=has_bias)


class FusedAdam(torch.optim.Optimizer):
    """Contract of the `FusedAdam` of transformer-engine: one counter for each group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert True not in (amsgrad, capturable, master_weights)
        assert adam_w_mode
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        USED["adam"] += 1
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                if p.grad is None:
                    continue
                assert set(state) == {"exp_avg", "exp_avg_sq"}
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.mul_(first).add_(p.grad, alpha=1 - first)
                square.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                corrected = mean / (1 - first ** group["step"])
                root = (square / (1 - second ** group["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] * (corrected / root + group["weight_decay"] * p))


WRAPPERS = "megatron.core.extensions.transformer_engine"
ALL = {
    ("transformer_engine.pytorch", "DotProductAttention"): object,
    (WRAPPERS, "TEDotProductAttention"): Attention,
    (WRAPPERS, "TENorm"): Norm,
    ("transformer_engine.pytorch.optimizers", "FusedAdam"): FusedAdam,
}


@contextmanager
def stand_ins(*, fp32_attention: bool = True) -> Iterator[Counter[str]]:
    """Put all stand-ins in the places of the packages, as on a machine with CUDA.

    Args:
        fp32_attention: let attention compute in fp32, which the true one refuses.
    """
    from mpotrain.engine.megatron import cpu, extensions

    with ExitStack() as stack:
        cpu.install()
        stack.callback(cpu.uninstall)
        from megatron.core.optimizer import distrib_optimizer

        from mpotrain.engine.megatron import kernels

        USED.clear()
        stack.enter_context(patch.object(extensions, "_find", lambda *name: ALL.get(name)))
        stack.enter_context(patch.object(extensions, "_wanted", lambda setting: setting == "auto"))
        stack.enter_context(patch.object(distrib_optimizer, "Adam", FusedAdam))
        if fp32_attention:
            dtypes = (*kernels.ATTENTION_DTYPES, torch.float32)
            stack.enter_context(patch.object(kernels, "ATTENTION_DTYPES", dtypes))
        yield USED
