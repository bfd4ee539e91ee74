"""What a model counts beside its loss: summed over a step, and what follows from it.

Right predictions are reported; so are the loads of experts, and the selection biases of their
routers follow them. Those biases are buffers: state that training changes without a gradient, saved
like a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mpotrain.engine.base import WEIGHT, StateReader, StateTensor
from mpotrain.engine.state import host_copy, read_checked
from mpotrain.nn.moe.router import Router
from mpotrain.nn.roles import Role
from mpotrain.parallel.ranks import World

EXPERT_TOKENS = "expert_tokens"
"""Statistic (L, E): tokens that chose each expert of each mixture."""


class StatisticsSum:
    """Adds up the statistics of micro-batches, then of ranks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, statistics: Mapping[str, Tensor] | None) -> None:
        """Add those of a micro-batch; None where the model has none."""
        for name, value in (statistics or {}).items():
            value = value.detach().to(self._device, torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def over_ranks(self, world: World) -> dict[str, Tensor]:
        """Return the sums over all ranks (collective), float64 on the host."""
        if not self._sums:
            return {}
        # One message; every rank has the same names and shapes.
        names = sorted(self._sums)
        joined = torch.cat([self._sums[name].reshape(-1) for name in names])
        joined = world.all_reduce_sum(joined).cpu()
        parts = torch.split(joined, [self._sums[name].numel() for name in names])
        return {
            name: part.view(self._sums[name].shape) for name, part in zip(names, parts, strict=True)
        }

    def over_uneven_ranks(self, world: World) -> dict[str, Tensor]:
        """Return `over_ranks` where some ranks may have added nothing (collective)."""
        for shapes in world.gather_objects({n: tuple(s.shape) for n, s in self._sums.items()}):
            for name, shape in shapes.items():
                if name not in self._sums:
                    zeros = torch.zeros(shape, dtype=torch.float64, device=self._device)
                    self._sums[name] = zeros
        return self.over_ranks(world)


def balance_routers(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Move the selection biases of all routers towards even loads.

    Args:
        model: its routers come in the order of the rows of the statistics.
        statistics: sums over the whole global batch, the same on every rank.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    loads = statistics.get(EXPERT_TOKENS)
    if loads is None:
        return
    for router, load in zip(routers, loads, strict=True):
        router.update_balance(load)


def buffer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all buffers that are part of the training state, by logical name."""
    kept = model.state_dict(keep_vars=True).keys()
    return {name: tuple(b.shape) for name, b in model.named_buffers() if name in kept}


def export_buffers(model: nn.Module, world: World) -> Iterator[StateTensor]:
    """Yield the buffers of the training state; rank 0 writes them."""
    buffers = dict(model.named_buffers())
    for name, shape in buffer_shapes(model).items():
        tensors = {WEIGHT: host_copy(buffers[name])} if world.is_main else None
        yield StateTensor(name, Role.BUFFER, shape, tensors)


def import_buffers(model: nn.Module, read: StateReader) -> None:
    """Overwrite the buffers of the training state."""
    buffers = dict(model.named_buffers())
    for name, shape in buffer_shapes(model).items():
        buffers[name].copy_(read_checked(read, name, shape, num_updates=0)[WEIGHT])
