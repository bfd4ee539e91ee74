"""How hidden states come into column-parallel layers: once for all layers that read the same.

Each tensor-parallel rank computes some features of all positions, so gradients of the input are
summed over the ranks; under sequence parallelism a rank has some positions alone and gathers the
others (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2). Where queries, keys and values have
a matrix each, the three take one `Entered`: the input is gathered once, gathered once more for the
gradients of their weights, and its gradient is summed first on the rank and then over the ranks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable


class Entered:
    """The input of column-parallel layers as all tensor-parallel ranks read it.

    Attributes:
        whole: (S, B, I), all positions.
    """

    def __init__(self, x: Tensor, group: Any, *, is_split: bool) -> None:
        """Let hidden states come in.

        Args:
            x: (S, B, I); where positions are split (S/ranks, B, I).
            group: the tensor-parallel ranks.
            is_split: whether they share the positions of x.
        """
        self.whole: Tensor = x
        if is_split:
            self.whole = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
        elif group.size() > 1:
            self.whole = copy_to_tensor_model_parallel_region(x, group=group)
        self._node = self.whole.grad_fn if is_split else None

    def kept(self) -> AbstractContextManager[Any]:
        """Return a context for layers that read `whole`: of it autograd keeps the rank's positions.

        As in Megatron-core's layers, activations that are split over the ranks stay split. Nothing
        is done where x needs no gradient, in front of the first weight that is trained.
        """
        node = self._node
        if node is None:
            return nullcontext()
        address, size = self.whole.data_ptr(), self.whole.numel()

        def pack(saved: Tensor) -> Tensor | _Kept:
            is_whole = saved.data_ptr() == address and saved.numel() == size
            return _Kept(node, saved.shape) if is_whole and saved.is_contiguous() else saved

        def unpack(saved: Tensor | _Kept) -> Tensor:
            return saved if isinstance(saved, Tensor) else saved.tensor()

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Gather(torch.autograd.Function):
    """Gathers positions. Its node keeps the rank's part, for itself and for those that read on.

    It is kept by autograd's own means: around layers that are computed again it is not there before
    they are, as hooks further out see to it.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(part)
        ctx.group, ctx.again = group, None
        whole: Tensor = gather_from_sequence_parallel_region(part, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # All that read the whole input have their gradients by now.
        ctx.again = None
        part: Tensor = reduce_scatter_to_sequence_parallel_region(gradient, group=ctx.group)
        return part, None


@dataclass(frozen=True)
class _Kept:
    """What is kept of a gathered tensor: the node that can gather it again, and its shape."""

    node: Any
    shape: torch.Size

    def tensor(self) -> Tensor:
        """Return the whole tensor, gathered by the first that asks."""
        node = self.node
        if node.again is None:
            with torch.no_grad():
                (part,) = node.saved_tensors
                node.again = gather_from_sequence_parallel_region(part, group=node.group)
        whole: Tensor = node.again.view(self.shape)
        return whole
