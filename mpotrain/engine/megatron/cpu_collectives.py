"""Collectives with parts of unequal size, which gloo lacks, made of those it has.

Megatron-core's alltoall dispatcher needs them where experts are cut over ranks: every rank of the
group holds another number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Collective = Callable[..., Tensor]


def gather_along_first_dim(stock: Collective) -> Collective:
    """Return megatron-core's gather along dimension 0, with parts of unequal size as well.

    Args:
        stock: `_gather_along_first_dim`, called for parts of equal size.
    """

    def gather(
        input_: Tensor,
        group: Any,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return stock(input_, group, None, use_global_buffer)
        # All ranks send as many rows as the longest part has; what was filled up is cut off again.
        rows = max(output_split_sizes)
        sent = input_.new_zeros((rows, *input_.shape[1:]))
        sent[: input_.shape[0]] = input_
        received = [torch.empty_like(sent) for _ in output_split_sizes]
        dist.all_gather(received, sent, group=group)
        return torch.cat(
            [part[:size] for part, size in zip(received, output_split_sizes, strict=True)]
        )

    return gather


def reduce_scatter_along_first_dim(stock: Collective) -> Collective:
    """Return megatron-core's reduce-scatter along dimension 0, with unequal parts as well.

    Args:
        stock: `_reduce_scatter_along_first_dim`, called for parts of equal size.
    """

    def reduce_scatter(
        input_: Tensor,
        group: Any,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return stock(input_, group, None, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        start = sum(input_split_sizes[: group.rank()])
        return total[start : start + input_split_sizes[group.rank()]].clone()

    return reduce_scatter


def as_split_sizes(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return what megatron-core's `maybe_move_tensor_to_cpu` returns for a CUDA tensor.

    Its own version leaves tensors that are on the CPU already as they are, and
    `all_to_all_single` takes no tensor for the sizes of its parts.

    Args:
        value: sizes in a tensor, or anything else, which stays.
        as_numpy: whether sizes are wanted as an array.
        record_stream: there are no streams here.
    """
    return value.numpy() if as_numpy and isinstance(value, Tensor) else value
