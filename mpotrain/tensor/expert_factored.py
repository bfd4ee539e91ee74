"""The plan "factored": no expert is ever rebuilt; all rows share one product with C.

    x[m, iL, i3, iR] -L_e-> u[m, iR, jL, i3, d2] -C-> v[m, jL, j3, iR, d3] -R_e-> y[m, jL, j3, jR]

The central tensor is one (i3 d2, j3 d3) matrix for all rows of all experts. Where the left side has
no output modes and the right side no input modes (jL = iR = 1) nothing but the input modes of x is
ever reordered. Backward computes u again and finds v kept, or computes that again too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpotrain.tensor.expert_plan import ExpertPlan
from mpotrain.tensor.expert_sides import Side, product_dtype, reordered
from mpotrain.tensor.grouped import (
    add_to_rows,
    rows_gradients,
    rows_times,
    sum_of_rows,
)


class _Factors:
    """The three matrices of a layer in the dtype of x, and the orders of axes between them."""

    def __init__(
        self,
        plan: ExpertPlan,
        counts: Sequence[int],
        dtype: torch.dtype,
        central: Tensor,
        auxiliaries: Sequence[Tensor],
    ) -> None:
        spec, self.shape = plan.spec, plan.shape
        self.counts, self.num_rows = counts, sum(counts)
        self.sides = Side.left(spec), Side.right(spec)
        cut = spec.central_index
        self.cores = auxiliaries[:cut], auxiliaries[cut:]
        self.wide = product_dtype(plan.merge_precision, dtype, [central, *auxiliaries])
        left, right = (
            side.merged(cores, self.wide)
            for side, cores in zip(self.sides, self.cores, strict=True)
        )
        s, experts = self.shape, len(counts)
        self.left = left.view(experts, s.left_in, s.left_out * s.left_bond).to(dtype)
        # (E, d3, iR, jR) -> (E, iR d3, jR)
        right = right.view(experts, s.right_bond, s.right_in, s.right_out).transpose(1, 2)
        self.right = right.reshape(experts, s.right_in * s.right_bond, s.right_out).to(dtype)
        self.central = reordered(central.transpose(0, 1), dtype).view(
            s.central_in * s.left_bond, s.central_out * s.right_bond
        )

    def enter(self, x: Tensor) -> Tensor:
        """Bring the modes of x (M, iL i3 iR) that L_e contracts to the end: (M i3 iR, iL)."""
        s, others = self.shape, self.shape.central_in * self.shape.right_in
        apart = x.reshape(self.num_rows, s.left_in, others)
        return apart.transpose(1, 2).reshape(self.num_rows * others, s.left_in)

    def leave(self, gradient: Tensor) -> Tensor:
        """Reverse `enter`: (M i3 iR, iL) to (M, I)."""
        s, others = self.shape, self.shape.central_in * self.shape.right_in
        apart = gradient.view(self.num_rows, others, s.left_in)
        return apart.transpose(1, 2).reshape(self.num_rows, s.left_in * others)

    def inner(self, entered: Tensor) -> Tensor:
        """Multiply by L_e: u (M iR jL, i3 d2) of (M i3 iR, iL)."""
        s, rows = self.shape, self.num_rows
        state = rows_times(entered, self.left, self.inner_counts)
        apart = state.view(rows, s.central_in, s.right_in, s.left_out, s.left_bond)
        return apart.permute(0, 2, 3, 1, 4).reshape(
            rows * s.right_in * s.left_out, s.central_in * s.left_bond
        )

    def inner_gradient(self, flow: Tensor) -> Tensor:
        """Reorder the gradient of u to (M i3 iR, jL d2)."""
        s, rows = self.shape, self.num_rows
        apart = flow.view(rows, s.right_in, s.left_out, s.central_in, s.left_bond)
        return apart.permute(0, 3, 1, 2, 4).reshape(
            rows * s.central_in * s.right_in, s.left_out * s.left_bond
        )

    def outer(self, inner: Tensor) -> Tensor:
        """Multiply by C: v (M jL j3, iR d3) of u."""
        s, rows = self.shape, self.num_rows
        state = torch.mm(inner, self.central)
        apart = state.view(rows, s.right_in, s.left_out, s.central_out, s.right_bond)
        return apart.permute(0, 2, 3, 1, 4).reshape(
            rows * s.left_out * s.central_out, s.right_in * s.right_bond
        )

    def inward(self, flow: Tensor) -> Tensor:
        """Reorder the gradient of v to the order (M iR jL, j3 d3) of C's output."""
        s, rows = self.shape, self.num_rows
        apart = flow.view(rows, s.left_out, s.central_out, s.right_in, s.right_bond)
        return apart.permute(0, 3, 1, 2, 4).reshape(
            rows * s.right_in * s.left_out, s.central_out * s.right_bond
        )

    @property
    def inner_counts(self) -> list[int]:
        """Rows of each expert where it meets L_e."""
        return [self.shape.central_in * self.shape.right_in * count for count in self.counts]

    @property
    def outer_counts(self) -> list[int]:
        """Rows of each expert where it meets R_e."""
        return [self.shape.left_out * self.shape.central_out * count for count in self.counts]

    def left_core_gradients(self, gradient: Tensor) -> list[Tensor]:
        """Project the gradient of L (E, iL, jL d2) on the auxiliaries left of C."""
        s = self.shape
        wide = gradient.to(self.wide)
        apart = wide.view(len(wide), 1, s.left_in, s.left_out, s.left_bond)
        return self.sides[0].project(apart, self.cores[0])

    def right_core_gradients(self, gradient: Tensor) -> list[Tensor]:
        """Project the gradient of R (E, iR d3, jR) on the auxiliaries right of C."""
        s = self.shape
        wide = gradient.to(self.wide)
        apart = wide.view(len(wide), s.right_in, s.right_bond, s.right_out)
        return self.sides[1].project(apart.transpose(1, 2).unsqueeze(-1), self.cores[1])


class FactoredLinear(torch.autograd.Function):
    """y = x L_e C R_e + b_e; keeps x, the cores and, where the plan says so, v."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        plan: ExpertPlan,
        counts: tuple[int, ...],
        *cores: Tensor,
    ) -> Tensor:
        """Return y (M, J) for x (M, I); `cores` are the central tensor and the auxiliaries."""
        factors = _Factors(plan, counts, x.dtype, cores[0], cores[1:])
        state = factors.outer(factors.inner(factors.enter(x)))
        ctx.plan, ctx.counts, ctx.bias_dtype = plan, counts, None if bias is None else bias.dtype
        ctx.save_for_backward(x, *cores, *((state,) if plan.keep_state else ()))
        y = rows_times(state, factors.right, factors.outer_counts)
        y = y.view(len(x), plan.spec.out_features)
        if bias is not None:
            add_to_rows(y, bias, counts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the bias, the central tensor and the auxiliaries."""
        plan: ExpertPlan = ctx.plan
        x, *cores = ctx.saved_tensors
        kept: Tensor | None = cores.pop() if plan.keep_state else None
        factors = _Factors(plan, ctx.counts, x.dtype, cores[0], cores[1:])
        cut = plan.spec.central_index
        wants_x, wants_bias, _, _, wants_central, *wants = ctx.needs_input_grad
        wants_left, wants_right = any(wants[:cut]), any(wants[cut:])
        wants_flow = wants_x or wants_left
        dx: Tensor | None = None
        found: list[Tensor | None] = [None] * len(cores)
        db = sum_of_rows(gradient, ctx.counts, ctx.bias_dtype) if wants_bias else None
        entered = factors.enter(x)
        inner = factors.inner(entered)
        state = factors.outer(inner) if kept is None else kept
        del kept
        flow, right = rows_gradients(
            gradient.reshape(-1, factors.shape.right_out),
            state,
            factors.right,
            factors.outer_counts,
            (wants_central or wants_flow, wants_right),
        )
        del state
        if right is not None:
            found[1 + cut :] = factors.right_core_gradients(right)
        if flow is not None:
            flow = factors.inward(flow)
            if wants_central:
                found[0] = _central_gradient(torch.mm(inner.t(), flow), cores[0])
        del inner
        if flow is not None and wants_flow:
            flow = factors.inner_gradient(torch.mm(flow, factors.central.t()))
            dx, left = rows_gradients(
                flow, entered, factors.left, factors.inner_counts, (wants_x, wants_left)
            )
            dx = None if dx is None else factors.leave(dx)
            if left is not None:
                found[1 : 1 + cut] = factors.left_core_gradients(left)
        return (dx, db, None, None, *found)


def _central_gradient(gradient: Tensor, central: Tensor) -> Tensor:
    """Reorder the gradient of the (i3 d2, j3 d3) matrix to that of the central tensor."""
    d2, i3, j3, d3 = central.shape
    return reordered(gradient.view(i3, d2, j3, d3).transpose(0, 1), central.dtype)


factored_linear: Callable[..., Tensor] = FactoredLinear.apply
"""Typed entry of `FactoredLinear`: (x, bias, plan, counts, central, *auxiliaries)."""
