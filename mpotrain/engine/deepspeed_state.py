"""Training state out of and into DeepSpeed, one whole parameter at a time.

DeepSpeed's own checkpoint files can be read in the layout that wrote them and no other. Here every
parameter passes under its logical name as whole fp32 tensors, so that any engine in any layout can
go on; at most one parameter is whole in memory beyond what training holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpotrain.engine.base import MOMENTS, WEIGHT, StateReader, StateTensor
from mpotrain.engine.deepspeed_partition import Partition
from mpotrain.engine.fragment import Fragment
from mpotrain.engine.state import fresh_adam_state, host_copy, read_checked
from mpotrain.nn.roles import role_of
from mpotrain.parallel.ranks import World

KINDS = (WEIGHT, *MOMENTS)


def export_fragments(
    partition: Partition,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    shapes: dict[str, tuple[int, ...]],
    world: World,
    num_updates: int,
) -> Iterator[StateTensor]:
    """Yield the state of all parameters; parameter number i lands on rank i mod world size.

    Args:
        partition: where the state lies.
        optimizer: holds the moments of what the partition's flats are.
        parameters: parameters by logical name.
        shapes: their whole shapes (a split parameter has lost its own).
        world: the ranks.
        num_updates: updates so far; 0 means that there are no moments yet.
    """
    kinds = KINDS if num_updates else (WEIGHT,)
    for index, (name, parameter) in enumerate(parameters.items()):
        owner = index % world.size
        fragment = partition.fragment(parameter)
        tensors = None
        if not partition.shared or owner == world.rank:
            numel = _numel(shapes[name])
            whole = torch.zeros(len(kinds), numel, dtype=torch.float32, device=world.device)
            if fragment is not None:
                _fill(whole, fragment, optimizer, kinds)
            if not partition.shared:
                # Ranks own disjoint elements and all others are zero, so a sum of the bits as
                # integers puts the fragments together exactly, negative zeros and NaN included.
                world.reduce_sum(whole.view(torch.int32), owner)
            if owner == world.rank:
                tensors = {
                    kind: host_copy(row.view(shapes[name]))
                    for kind, row in zip(kinds, whole, strict=True)
                }
        yield StateTensor(name, role_of(parameter), shapes[name], tensors)


def import_fragments(
    partition: Partition,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    shapes: dict[str, tuple[int, ...]],
    read: StateReader,
    num_updates: int,
    updates_of: Callable[[dict[str, Any]], int],
) -> None:
    """Write the state of all parameters into this rank's fragments; see `export_fragments`.

    Args:
        partition: where the state lies.
        optimizer: gets the moments.
        parameters: parameters by logical name.
        shapes: their whole shapes.
        read: returns whole tensors of a logical name.
        num_updates: Adam's counter.
        updates_of: returns the counter of an optimizer group.
    """
    optimizer.state.clear()
    if num_updates:
        for group, flat in partition.flats():
            optimizer.state[flat] = fresh_adam_state(group, flat, updates_of(group))
    for name, parameter in parameters.items():
        tensors = read_checked(read, name, shapes[name], num_updates)
        fragment = partition.fragment(parameter)
        if fragment is None:
            continue
        state: dict[str, Any] = optimizer.state[fragment.flat] if num_updates else {}
        for kind, tensor in tensors.items():
            target = fragment.flat if kind == WEIGHT else state[kind]
            part = tensor.reshape(-1).narrow(0, fragment.start, fragment.numel)
            fragment.of(target).copy_(part)
    partition.publish(parameters)


def _fill(
    whole: Tensor,
    fragment: Fragment,
    optimizer: torch.optim.Optimizer,
    kinds: tuple[str, ...],
) -> None:
    state = optimizer.state.get(fragment.flat, {})
    for kind, row in zip(kinds, whole, strict=True):
        source = fragment.flat if kind == WEIGHT else state.get(kind)
        if source is None:  # a central tensor that has always rested has no moments yet
            continue
        row.narrow(0, fragment.start, fragment.numel).copy_(fragment.of(source))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
