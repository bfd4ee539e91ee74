"""Which part of which logical tensor a parameter of a rank is.

A checkpoint, the start weights and every other engine know a network by logical names and whole
tensors. A parameter of this engine carries a `Placement`: the logical name and the cuts that lead
from the whole tensor to what this rank holds. Loading, saving, norms and reductions follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.nn.roles import Role


@dataclass(frozen=True)
class Cut:
    """One dimension of a tensor, shared out over the ranks of a group.

    Attributes:
        dim: the dimension.
        parts: ranks of the group.
        index: this rank's place in it.
        period: of every `period` consecutive values a rank holds one part; None = of all values.
        padded: size to which the dimension is filled up with zeros before it is cut.
    """

    dim: int
    parts: int
    index: int
    period: int | None = None
    padded: int | None = None

    def take(self, whole: Tensor) -> Tensor:
        """Return a copy of this rank's part of a whole tensor."""
        if self.padded is not None:
            fill = [0, 0] * (whole.ndim - self.dim - 1) + [0, self.padded - whole.shape[self.dim]]
            whole = functional.pad(whole, fill)
        parts = self._view(whole.contiguous())
        return parts.select(self.dim + 1, self.index).flatten(self.dim, self.dim + 1)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write this rank's part into a whole tensor; padding is left out."""
        if self.padded is None:
            view = self._view(whole)
            shape = (*view.shape[: self.dim + 1], *view.shape[self.dim + 2 :])
            view.select(self.dim + 1, self.index).copy_(part.reshape(shape))
            return
        size = self.padded // self.parts
        start = size * self.index
        count = max(0, min(size, whole.shape[self.dim] - start))
        if count:
            target = whole.narrow(self.dim, start, count)
            target.copy_(part.narrow(self.dim, 0, count))

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a part of a tensor of shape `whole`."""
        sizes = list(whole)
        sizes[self.dim] = (self.padded or sizes[self.dim]) // self.parts
        return tuple(sizes)

    def _view(self, whole: Tensor) -> Tensor:
        size = whole.shape[self.dim]
        period = size if self.period is None else self.period
        sizes = (size // period, self.parts, period // self.parts)
        return whole.view(*whole.shape[: self.dim], *sizes, *whole.shape[self.dim + 1 :])


@dataclass(frozen=True)
class Placement:
    """A parameter of a rank as part of a logical tensor.

    Attributes:
        name: logical name.
        shape: whole shape.
        role: what the tensor is.
        cuts: of different dimensions; () = held whole.
        is_partial: every tensor-parallel rank computes a part of the gradient, which is the sum
            over them. False where a rank's own gradient is whole (its own cut, or the same on all).
        is_expert: reduced over the ranks that hold the same experts, not over all data ranks.
        is_shared: other chunks or stages of the pipeline hold a copy, and the gradient is the sum
            over all copies.
        num_experts: experts that the first dimension of the whole tensor runs over; 0 = none.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    cuts: tuple[Cut, ...] = ()
    is_partial: bool = False
    is_expert: bool = False
    is_shared: bool = False
    num_experts: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of what this rank holds."""
        shape = self.shape
        for cut in self.cuts:
            shape = cut.shape(shape)
        return shape

    def take(self, whole: Tensor) -> Tensor:
        """Return a contiguous copy of this rank's part of a whole tensor."""
        for cut in self.cuts:
            whole = cut.take(whole)
        return whole.clone(memory_format=torch.contiguous_format)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write this rank's part into a whole tensor."""
        if not self.cuts:
            whole.copy_(part)
        elif len(self.cuts) == 1:
            self.cuts[0].put(whole, part)
        else:
            # Several cuts leave no view: number the elements, and cut the numbers (0 is padding).
            numbers = torch.arange(1, whole.numel() + 1, device=whole.device).view(whole.shape)
            mine = self.take(numbers)
            whole.view(-1)[mine[mine > 0] - 1] = part[mine > 0]


_ATTRIBUTE = "_mpotrain_placement"


def place(parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
    """Mark a parameter with its placement and return it."""
    setattr(parameter, _ATTRIBUTE, placement)
    return parameter


def placement_of(parameter: nn.Parameter) -> Placement:
    """Return the placement of a parameter.

    Raises:
        KeyError: it has none: a module of another library was built without being placed.
    """
    placement: Placement | None = getattr(parameter, _ATTRIBUTE, None)
    if placement is None:
        raise KeyError(f"a parameter of shape {tuple(parameter.shape)} has no placement")
    return placement
