"""Counts the bytes that a rank of the Megatron engine sends, by what they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _ring(times: float, group: Any, nbytes: float) -> float:
    ranks = dist.get_world_size(group)
    return times * (ranks - 1) / ranks * nbytes


def _sent_elsewhere(tensor: Tensor, splits: Sequence[int] | None, group: Any) -> float:
    """Return what of an exchange leaves the rank."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if splits is None:
        return _ring(1, group, _nbytes(tensor))
    if ranks == 1:
        return 0.0
    rows = [int(count) for count in splits]
    return _nbytes(tensor) * (1 - rows[rank] / max(sum(rows), 1))


class Sent(Counter[tuple[str, str]]):
    """Bytes by (name of the group, kind of call)."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, str] = {}

    def name_groups(self) -> None:
        """Learn the groups that megatron-core has started."""
        from megatron.core import parallel_state as state

        from mpotrain.engine.megatron.groups import Groups

        groups = vars(Groups.current()) | {
            "embedding": state.get_embedding_group(check_initialized=False),
            "tensor and context": state.get_tensor_and_context_parallel_group(),
            "tensor and expert": state.get_expert_tensor_and_model_parallel_group(),
        }
        # Not every rank is in each; all of them together are "others".
        self._names = {id(group): name for name, group in groups.items() if group is not None}

    def count(self, kind: str, group: Any, nbytes: float) -> None:
        """Count what one call sends."""
        self[self._names.get(id(group), "others"), kind] += nbytes  # type: ignore[assignment]

    def all_reduce(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **more: Any
        ) -> Any:
            self.count("reduce", group, _ring(2, group, _nbytes(tensor)))
            return original(tensor, op=op, group=group, **more)

        return call

    def gather(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: Tensor, part: Tensor, group: Any = None, **more: Any) -> Any:
            self.count("gather", group, _ring(1, group, _nbytes(output)))
            return original(output, part, group=group, **more)

        return call

    def reduce_scatter(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            output: Tensor, whole: Tensor, *arguments: Any, group: Any = None, **more: Any
        ) -> Any:
            self.count("reduce", group, _ring(1, group, _nbytes(whole)))
            return original(output, whole, *arguments, group=group, **more)

        return call

    def exchange(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            output: Tensor, given: Tensor, *, input_split_sizes: Any = None, group: Any = None,
            **more: Any,
        ) -> Any:  # fmt: skip
            self.count("exchange", group, _sent_elsewhere(given, input_split_sizes, group))
            return original(output, given, input_split_sizes=input_split_sizes, group=group, **more)

        return call

    def send(self, original: Callable[..., Any]) -> Callable[..., Any]:
        is_inside = False

        @wraps(original)
        def call(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
            nonlocal is_inside
            # Under a torch function mode, such as that of the CPU shim, it calls itself once more.
            if is_inside:
                return original(tensor, *arguments, **more)
            self["pipeline", "send"] += _nbytes(tensor)
            is_inside = True
            try:
                return original(tensor, *arguments, **more)
            finally:
                is_inside = False

        return call

    def of(self, *groups: str, kinds: Sequence[str] = ("reduce", "gather", "exchange")) -> float:
        """Return what was sent in some groups."""
        return float(
            sum(
                nbytes
                for (group, kind), nbytes in self.items()
                if group in groups and kind in kinds
            )
        )


@contextmanager
def counting() -> Iterator[Sent]:
    """Count all calls in a block; the groups are those of the engine that runs."""
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.tensor_parallel import mappings
    from torch.distributed import distributed_c10d as c10d

    sent = Sent()
    sent.name_groups()
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (dist, "all_reduce", sent.all_reduce),
        (dist, "all_gather_into_tensor", sent.gather),
        (dist, "reduce_scatter_tensor", sent.reduce_scatter),
        (dist, "all_to_all_single", sent.exchange),
    ]
    for module in (mappings, buffers):
        places.append((module, "dist_all_gather_func", sent.gather))
        places.append((module, "dist_reduce_scatter_func", sent.reduce_scatter))
    # Batches of sends want the function that the module itself knows.
    send = sent.send(dist.isend)
    patches = [patch.object(module, "isend", send) for module in (dist, c10d)]
    patches += [
        patch.object(module, name, wrap(getattr(module, name))) for module, name, wrap in places
    ]
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        yield sent
