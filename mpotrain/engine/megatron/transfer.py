"""Training state out of and into the ranks' parameters, one whole logical tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mpotrain.engine.base import MOMENTS, WEIGHT, StateReader, StateTensor
from mpotrain.engine.megatron.adam import begin_groups, begin_state
from mpotrain.engine.megatron.masters import Master
from mpotrain.engine.megatron.placement import placement_of
from mpotrain.engine.state import host_copy, read_checked
from mpotrain.nn.roles import Role
from mpotrain.parallel.ranks import World

KINDS = (WEIGHT, *MOMENTS)


class Transfer:
    """Gathers logical tensors from all ranks and spreads them over all ranks."""

    def __init__(
        self,
        wholes: Mapping[str, tuple[tuple[int, ...], Role]],
        chunks: Sequence[nn.Module],
        masters: Sequence[Master],
        counted: Callable[[Master], bool],
        world: World,
    ) -> None:
        """Prepare.

        Args:
            wholes: whole shape and role of every logical tensor, in the order of checkpoints.
            chunks: of this rank.
            masters: what this rank updates.
            counted: whether a master is the one of its copies that stands for all of them.
            world: all ranks.
        """
        self._wholes, self._world = wholes, world
        self._parameters: dict[str, list[nn.Parameter]] = {}
        for chunk in chunks:
            for parameter in chunk.parameters():
                self._parameters.setdefault(placement_of(parameter).name, []).append(parameter)
        self._masters: dict[str, list[Master]] = {}
        for master in masters:
            self._masters.setdefault(master.placement.name, []).append(master)
        self._counted = {id(master) for master in masters if counted(master)}

    def export(self, num_updates: int) -> Iterator[StateTensor]:
        """Yield the state of all tensors; number i lands on rank i mod world size (collective).

        Args:
            num_updates: updates so far; 0 means that there are no moments yet.
        """
        kinds = KINDS if num_updates else (WEIGHT,)
        for index, (name, (shape, role)) in enumerate(self._wholes.items()):
            owner = index % self._world.size
            whole = self._own_part(name, kinds)
            # Ranks own disjoint elements and all others are zero: summed as integers, the bits
            # come out exactly, negative zeros and NaN included.
            self._world.reduce_sum(whole.view(torch.int32), owner)
            tensors = None
            if owner == self._world.rank:
                tensors = {
                    kind: host_copy(row.view(shape)) for kind, row in zip(kinds, whole, strict=True)
                }
            yield StateTensor(name, role, shape, tensors)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights whole, on every rank's device (collective)."""
        for name, (shape, _) in self._wholes.items():
            whole = self._own_part(name, (WEIGHT,))
            self._world.all_reduce_sum(whole.view(torch.int32))
            yield name, whole.view(shape)

    def load(
        self,
        read: StateReader,
        num_updates: int,
        updates_of: Callable[[dict[str, Any]], int],
    ) -> None:
        """Overwrite weights, masters and moments.

        Args:
            read: returns the whole tensors of a logical name.
            num_updates: updates so far.
            updates_of: returns Adam's counter of an optimizer group.
        """
        optimizers = {id(m.optimizer): m.optimizer for m in self._all_masters()}
        groups = {
            id(main): group
            for optimizer in optimizers.values()
            for group in optimizer.param_groups
            for main in group["params"]
        }
        for optimizer in optimizers.values():
            optimizer.state.clear()
            begin_groups(optimizer, num_updates, updates_of)
        for name, (shape, _) in self._wholes.items():
            if name not in self._parameters:
                continue  # held by other stages
            tensors = read_checked(read, name, shape, num_updates)
            for parameter in self._parameters[name]:
                part = placement_of(parameter).take(tensors[WEIGHT])
                parameter.data.copy_(part)
            for master in self._masters.get(name, ()):
                state = {}
                if num_updates:
                    group = groups[id(master.main)]
                    count = updates_of(group)
                    state = begin_state(master.optimizer, group, master.main, count)
                    master.optimizer.state[master.main] = state
                for kind, tensor in tensors.items():
                    target = master.main if kind == WEIGHT else state[kind]
                    part = master.placement.take(tensor).reshape(-1)
                    part = part.narrow(0, master.start, master.main.numel())
                    target.data.copy_(part.view(target.shape))

    def _all_masters(self) -> Iterable[Master]:
        return (master for masters in self._masters.values() for master in masters)

    def _own_part(self, name: str, kinds: Sequence[str]) -> Tensor:
        """Return this rank's elements of a whole tensor (K, numel), zero elsewhere."""
        shape = self._wholes[name][0]
        whole = torch.zeros(len(kinds), prod(shape), device=self._world.device)
        for master in self._masters.get(name, ()):
            if id(master) not in self._counted:
                continue
            state = master.optimizer.state.get(master.main, {})
            for kind, row in zip(kinds, whole, strict=True):
                source = master.main if kind == WEIGHT else state.get(kind)
                if source is None:
                    continue  # a central tensor that has always rested has no moments yet
                part = torch.zeros(master.parameter.numel(), device=self._world.device)
                end = master.start + source.numel()
                part[master.start : end] = source.detach().reshape(-1)
                master.placement.put(row.view(shape), part.view(master.placement.local_shape))
        return whole
