"""Differentiable sums over ranks that megatron-core's mappings do not have.

Those work in place on what they are given and take one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; what a rank's own summand gets is the gradient of its own result.

    Every rank computes the same loss from the sum. The loss counts once, and each rank takes the
    part of its gradient that belongs to its own tokens.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


sum_over_ranks: Callable[..., Tensor] = _SumOverRanks.apply
"""Return the sum of a tensor over the ranks of a group: (value, group)."""


class _SumGradients(torch.autograd.Function):
    """The tensors themselves; backward sums their gradients over ranks, in one message."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        joined = torch.cat([_wide(gradient).reshape(-1) for gradient in gradients])
        dist.all_reduce(joined, group=ctx.group)
        parts = torch.split(joined, [gradient.numel() for gradient in gradients])
        summed = [
            part.view(gradient.shape).to(gradient.dtype)
            for part, gradient in zip(parts, gradients, strict=True)
        ]
        return None, *summed


sum_gradients: Callable[..., Sequence[Tensor]] = _SumGradients.apply
"""Return tensors that all ranks of a group hold and each uses for a part: (group, *tensors)."""


def _wide(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(torch.float32, gradient.dtype))
