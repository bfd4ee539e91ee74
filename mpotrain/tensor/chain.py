"""The plans "chain" and "groups": contract the input with one group of cores after the other.

Each step is one product of the tokens' state with the matrix of a group, in the layout that the
plan has chosen for it, see `mpotrain.tensor.steps.ChainStep`. Axes are reordered lazily, once per
step at most. Backward recomputes the states; only the input and the cores are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mpotrain.tensor.materialise import bias_gradient
from mpotrain.tensor.merge import (
    leaves,
    merge,
    merge_dtype,
    merge_factors,
    merge_gradients,
    split_modes,
)
from mpotrain.tensor.plan import ContractionPlan
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.steps import ChainStep, Direction, Order
from mpotrain.tensor.tree import merge_order

# Axes (d_left, in modes, out modes, d_right) of a group as a (rows, inner) matrix of a step.
_MATRIX_AXES: dict[Direction, tuple[int, int, int, int]] = {
    "lr": (2, 3, 0, 1),
    "rl": (0, 2, 1, 3),
}


class ChainLinear(torch.autograd.Function):
    """y = x W + b by a chain over groups of cores; keeps x and the cores."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, plan: ContractionPlan, *cores: Tensor
    ) -> Tensor:
        """Return y (..., out_features) for x (..., in_features)."""
        ctx.plan, ctx.bias_dtype = plan, None if bias is None else bias.dtype
        ctx.save_for_backward(x, *cores)
        spec, steps = plan.spec, plan.steps
        state = _first_state(x, spec, steps[0])
        for step, after in zip(steps, [*steps[1:], None], strict=True):
            matrix = _Group(cores, spec, step).matrix(x.dtype)
            state = _apply(matrix, _enter(state, step), step, after)
        y = state.reshape(-1, spec.padded_out)[:, : spec.out_features]
        if bias is not None:
            y = y + bias.to(x.dtype)
        return y.reshape(*x.shape[:-1], spec.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the bias and the cores."""
        plan: ContractionPlan = ctx.plan
        spec, steps = plan.spec, plan.steps
        x, *cores = ctx.saved_tensors
        dy = gradient.reshape(-1, spec.out_features)
        wanted = [k for k in range(spec.num_cores) if ctx.needs_input_grad[3 + k]]
        core_gradients: list[Tensor | None] = [None] * spec.num_cores
        groups = [_Group(cores, spec, step) for step in steps]
        matrices = [group.matrix(x.dtype) for group in groups]
        states = _states(x, matrices, steps, spec) if wanted else []
        db = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        last = steps[-1]
        flow = _pad(dy, spec.padded_out).reshape(-1, last.rows, last.width)
        for index in reversed(range(len(steps))):
            step = steps[index]
            here = [k for k in wanted if step.group[0] <= k <= step.group[1]]
            state = states.pop() if states else None
            flow = _leave(flow, step)
            if here and state is not None:
                found = groups[index].project(_matrix_gradient(flow, state, step), here)
                for k, value in found.items():
                    core_gradients[k] = value.reshape(cores[k].shape).to(cores[k].dtype)
            if index > 0 or ctx.needs_input_grad[0]:
                flow = _apply_transposed(matrices[index], flow, step)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = flow.reshape(-1, spec.padded_in)[:, : spec.in_features].reshape(x.shape)
        return (dx, db, None, *core_gradients)


chain_linear: Callable[..., Tensor] = ChainLinear.apply
"""Typed entry of `ChainLinear`: (x, bias, plan, *cores)."""


def _pad(matrix: Tensor, columns: int) -> Tensor:
    missing = columns - matrix.shape[1]
    return functional.pad(matrix, (0, missing)) if missing else matrix


class _Group:
    """A group of neighbouring cores, merged in fp32, seen as the matrix of a step."""

    def __init__(self, cores: Sequence[Tensor], spec: MPOSpec, step: ChainStep) -> None:
        self.spec, self.step, self.axes = spec, step, _MATRIX_AXES[step.direction]
        self.merges = merge_order(spec, *step.group)
        self.parts = leaves(cores, *step.group, merge_dtype(cores))
        merge_factors(self.parts, self.merges)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the contiguous (rows, inner) matrix in `dtype`."""
        if self.merges:
            last = self.merges[-1]
            product = merge(self.parts[last.left], self.parts[last.right])
        else:
            product = self.parts[self.step.group]
        split = self._split(product)
        shape = (self.step.rows, self.step.inner)
        matrix = torch.empty(shape, dtype=dtype, device=product.device)
        matrix.view(split.shape).copy_(split)
        return matrix

    def project(self, gradient: Tensor, wanted: Collection[int]) -> dict[int, Tensor]:
        """Return the gradients of the wanted cores from that of the (rows, inner) matrix."""
        first, last = self.step.group
        left, right = self.parts[first, first].shape[0], self.parts[last, last].shape[2]
        shape = (left, gradient.numel() // (left * right), right)
        product = torch.empty(shape, dtype=self.parts[first, first].dtype, device=gradient.device)
        target = self._split(product)
        target.copy_(gradient.view(target.shape))
        return merge_gradients(product, self.parts, self.merges, wanted)

    def _split(self, product: Tensor) -> Tensor:
        """View the merged cores with one axis for each mode and bond, in the matrix's order."""
        split = split_modes(product, self.spec, self.step.group)
        axes, count = range(split.ndim), len(self.merges) + 1
        blocks = (axes[:1], axes[1 : 1 + count], axes[1 + count : -1], axes[-1:])
        return split.permute([axis for block in self.axes for axis in blocks[block]])


def _first_state(x: Tensor, spec: MPOSpec, step: ChainStep) -> Tensor:
    """View x as the five axes of the first step."""
    padded = _pad(x.reshape(-1, spec.in_features), spec.padded_in)
    return padded.reshape(-1, *step.axes[1:])


def _enter(state: Tensor, step: ChainStep) -> Tensor:
    """Bring five axes into the layout of a step: (outer, inner, width) or (all, inner)."""
    state = state.permute(step.entry_order)
    if step.batched:
        return state.reshape(-1, step.inner, step.width)
    return state.reshape(-1, step.inner)


def _apply(matrix: Tensor, entered: Tensor, step: ChainStep, after: ChainStep | None) -> Tensor:
    """Multiply by the (rows, inner) matrix; view the result as the five axes of the next step."""
    if step.batched:
        product = torch.bmm(matrix.expand(len(entered), -1, -1), entered)
    else:
        product = torch.mm(entered, matrix.t())
    if after is None:
        return product if step.batched else product.view(-1, step.width, step.rows).transpose(1, 2)
    return _five_axes(product, after, step.exit_order)


def _leave(flow: Tensor, step: ChainStep) -> Tensor:
    """Bring the gradient of a step's result into its layout: (outer, rows, width) or (all, rows).

    The gradient comes as (outer, rows, width) for the last step, else as the five axes of the step
    behind.
    """
    if flow.ndim == 3:
        flow = flow if step.batched else flow.transpose(1, 2)
    else:
        flow = flow.permute(step.exit_order)
    if step.batched:
        return flow.reshape(-1, step.rows, step.width)
    return flow.reshape(-1, step.rows)


def _apply_transposed(matrix: Tensor, flow: Tensor, step: ChainStep) -> Tensor:
    """Return the gradient of a step's incoming state as its five axes."""
    if step.batched:
        gradient = torch.bmm(matrix.t().expand(len(flow), -1, -1), flow)
    else:
        gradient = torch.mm(flow, matrix)
    return _five_axes(gradient, step, step.entry_order)


def _five_axes(tensor: Tensor, step: ChainStep, order: Order) -> Tensor:
    """View contiguous memory, whose axes are those of `step` in `order`, in standard order."""
    tokens = tensor.numel() // step.state_size
    sizes = (tokens * step.axes[0], *step.axes[1:])
    viewed = tensor.view([sizes[axis] for axis in order])
    return viewed.permute([order.index(axis) for axis in range(5)])


def _states(
    x: Tensor, matrices: Sequence[Tensor], steps: Sequence[ChainStep], spec: MPOSpec
) -> list[Tensor]:
    """Return the state before each step, in the step's layout."""
    states = [_enter(_first_state(x, spec, steps[0]), steps[0])]
    for matrix, step, after in zip(matrices[:-1], steps[:-1], steps[1:], strict=True):
        states.append(_enter(_apply(matrix, states[-1], step, after), after))
    return states


def _matrix_gradient(flow: Tensor, state: Tensor, step: ChainStep) -> Tensor:
    """Return the gradient (rows, inner) of a step's matrix, summed over everything else."""
    if not step.batched:
        return torch.mm(flow.t(), state)
    left = flow.transpose(0, 1).reshape(step.rows, -1)
    right = state.transpose(0, 1).reshape(step.inner, -1)
    return torch.mm(left, right.t())
