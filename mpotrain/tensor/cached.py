"""Matrices rebuilt once for all micro-batches of a step, their gradient projected once.

Rebuilding W from its cores and projecting dW on them cost the same whatever the number of tokens.
Within a step the cores do not change, and both are linear in dW: so W is rebuilt in the first
forward pass, dW is summed over the micro-batches, and the sum is projected in the last backward
pass. Between them each micro-batch does what a dense layer does: one matrix product forward, two
backward. The price is the memory of W, and of the sum of dW in fp32, over the whole step.

Which backward pass is the last is found by counting: every forward pass that autograd records is
followed by one backward pass, and backward passes come in the order of the micro-batches, as in
all pipeline schedules. Only passes of the last micro-batch are connected to the cores: before, a
core gets no gradient at all, and hooks on its gradient fire in the last backward pass alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpotrain.tensor.materialise import (
    bias_gradient,
    project_weight_gradient,
    weight_from_cores,
)
from mpotrain.tensor.merge import merge_dtype
from mpotrain.tensor.spec import MPOSpec


class StepCache:
    """Opens and closes the steps over which matrices are kept.

    Outside of a step nothing is kept: an evaluation rebuilds its matrices as usual.
    """

    def __init__(self) -> None:
        # By identity of the cores: layers that share all of them share the matrix.
        self._matrices: dict[tuple[int, ...], CachedMatrix] = {}

    def matrix(self, cores: Sequence[Tensor], spec: MPOSpec) -> CachedMatrix:
        """Return the matrix of some parameters, for one more layer that multiplies by it.

        Args:
            cores: (d_{k-1}, i_k, j_k, d_k) each; a layer with the same cores gets the same matrix.
            spec: their shapes.
        """
        key = tuple(id(core) for core in cores)
        if key not in self._matrices:
            self._matrices[key] = CachedMatrix(cores, spec)
        found = self._matrices[key]
        found.num_layers += 1
        return found

    @property
    def matrices(self) -> tuple[CachedMatrix, ...]:
        """All matrices."""
        return tuple(self._matrices.values())

    @contextmanager
    def step(self, num_microbatches: int) -> Iterator[None]:
        """Keep matrices over the micro-batches of one step.

        Everything is dropped at the end, also when the step fails.

        Args:
            num_microbatches: forward and backward passes of each layer in this step.

        Raises:
            RuntimeError: a step is open already, or some gradient has not reached its cores
                because backward passes are missing.
        """
        for matrix in self._matrices.values():
            matrix.open(num_microbatches)
        try:
            yield
            for matrix in self._matrices.values():
                matrix.check()
        finally:
            for matrix in self._matrices.values():
                matrix.close()


class CachedMatrix:
    """One W, rebuilt at most once in a step.

    Attributes:
        spec: modes and bonds of the operator.
        num_layers: layers that multiply by it, each once in a micro-batch.
        num_rebuilds: how often W was rebuilt since the start.
        num_projections: how often a gradient was projected on the cores since the start.
    """

    def __init__(self, cores: Sequence[Tensor], spec: MPOSpec) -> None:
        # Held so that their identities are not given to other tensors.
        self._cores = tuple(cores)
        self.spec = spec
        self.num_layers = self.num_rebuilds = self.num_projections = 0
        self._step: _Step | None = None

    @property
    def is_open(self) -> bool:
        """Whether a step goes on."""
        return self._step is not None

    def open(self, num_microbatches: int) -> None:
        """Begin a step."""
        if self._step is not None:
            raise RuntimeError("a step of this cache is open already")
        self._step = _Step(self, num_microbatches)

    def check(self) -> None:
        """Raise where a gradient of the step that is open has not reached the cores."""
        step = self._step
        if step is not None and step.num_recorded and step.num_backward != step.num_awaited:
            raise RuntimeError(
                f"{step.num_backward} of {step.num_awaited} backward passes through a cached "
                f"matrix of modes {self.spec.in_modes} x {self.spec.out_modes} have run: its "
                "gradient has not reached the cores"
            )

    def close(self) -> None:
        """End the step and drop everything that was kept."""
        if self._step is not None:
            self._step.drop()
        self._step = None

    def linear(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """Return ``y = x @ W + b``.

        Args:
            x: (..., in_features), of any floating dtype.
            cores: the parameters, as read for this forward pass.
            bias: (out_features,), or None.

        Returns:
            y (..., out_features) in the dtype of x.

        Raises:
            RuntimeError: no step is open.
        """
        step = self._step
        if step is None:
            raise RuntimeError("no step of this cache is open")
        weight = step.rebuild(cores, x.dtype)
        if not (torch.is_grad_enabled() and any(core.requires_grad for core in cores)):
            return _product(x, weight, bias)
        connected = cores if step.record() else ()
        # Without the cores nothing else may ask for the backward pass that sums dW.
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return _cached_linear(x, bias, step, anchor, weight, *connected)


class _Step:
    """What one step keeps of one matrix.

    Attributes:
        num_awaited: backward passes until the gradient is whole.
        num_recorded: forward passes that autograd has recorded.
        num_backward: backward passes that have run.
    """

    def __init__(self, matrix: CachedMatrix, num_microbatches: int) -> None:
        self._matrix: CachedMatrix | None = matrix
        self._num_layers = matrix.num_layers
        self.spec = matrix.spec
        self.num_awaited = matrix.num_layers * num_microbatches
        self.num_recorded = self.num_backward = 0
        self._sum_dtype = torch.float32
        self._weight: Tensor | None = None
        self._gradient: Tensor | None = None

    def drop(self) -> None:
        """Forget everything; backward passes that come later are refused."""
        self._matrix = self._weight = self._gradient = None

    def rebuild(self, cores: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return W (in_features, out_features) in `dtype`."""
        if self._weight is None or self._weight.dtype != dtype:
            with torch.no_grad():
                self._weight = weight_from_cores(cores, self.spec, dtype)
            self._sum_dtype = torch.promote_types(dtype, merge_dtype(cores))
            self._owner().num_rebuilds += 1
        return self._weight

    def record(self) -> bool:
        """Count a forward pass; return whether it may belong to the last micro-batch.

        A pass inside a backward pass is a recomputation: it belongs to the micro-batch whose turn
        it is to go backward, however many forward passes have run meanwhile, and counts no second
        time where autograd has recorded the first one, too.
        """
        if torch._C._current_graph_task_id() != -1:
            self.num_recorded = max(self.num_recorded, 1)
            return self.num_backward >= self.num_awaited - self._num_layers
        self.num_recorded += 1
        return self.num_recorded > self.num_awaited - self._num_layers

    def add(self, rows: Tensor, dy: Tensor) -> None:
        """Add the gradient of W of one backward pass, rows^T dy, to the sum."""
        self._owner()
        self.num_backward += 1
        if self._gradient is None:
            self._gradient = torch.mm(rows.t(), dy).to(self._sum_dtype)
        elif self._gradient.dtype == dy.dtype:
            self._gradient.addmm_(rows.t(), dy)
        else:
            self._gradient.add_(torch.mm(rows.t(), dy))

    def project(self, cores: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor | None]:
        """Return the gradients of the cores: zeros until the last backward pass."""
        if self.num_backward != self.num_awaited or self._gradient is None:
            # Not None: hooks of data-parallel wrappers want a gradient wherever there is an edge.
            return [torch.zeros_like(c) if k in wanted else None for k, c in enumerate(cores)]
        gradient, self._gradient, self._weight = self._gradient, None, None
        self._owner().num_projections += 1
        return project_weight_gradient(gradient, cores, self.spec, wanted)

    def _owner(self) -> CachedMatrix:
        if self._matrix is None:
            raise RuntimeError("this backward pass belongs to a step that has ended")
        return self._matrix


class CachedLinear(torch.autograd.Function):
    """y = x W + b for a given W, whose gradient goes to the sum of the step."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        step: _Step,
        anchor: Tensor,
        weight: Tensor,
        *cores: Tensor,
    ) -> Tensor:
        """Return y (..., out_features); cores are given in the last micro-batch alone."""
        ctx.step, ctx.bias_dtype = step, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, *cores)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the bias, and in the last pass those of the cores."""
        step: _Step = ctx.step
        x, weight, *cores = ctx.saved_tensors
        dy = gradient.reshape(-1, step.spec.out_features)
        dx = torch.mm(dy, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        del weight
        db = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        step.add(x.reshape(-1, step.spec.in_features), dy)
        wanted = [k for k in range(len(cores)) if ctx.needs_input_grad[5 + k]]
        if not cores and step.num_backward == step.num_awaited:
            raise RuntimeError(
                "the last backward pass of a step does not belong to its last micro-batch"
            )
        return (dx, db, None, None, None, *step.project(cores, wanted))


_cached_linear: Callable[..., Tensor] = CachedLinear.apply


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, weight.shape[0])
    y = torch.mm(rows, weight) if bias is None else torch.addmm(bias.to(x.dtype), rows, weight)
    return y.view(*x.shape[:-1], weight.shape[1])
