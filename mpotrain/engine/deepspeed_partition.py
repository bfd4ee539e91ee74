"""Where each ZeRO stage keeps what belongs to a parameter on this rank.

DeepSpeed flattens the parameters of a group into one vector and gives every rank a part of it
(stages 1 and 2) or cuts every parameter into equal parts (stage 3). Masters, moments and reduced
gradients exist only for the own part. One `Partition` for each way hides this: it maps a parameter
to the `Fragment` of it that this rank owns; over all ranks the fragments cover each element once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpotrain.engine.deepspeed_experts import ExpertShards
from mpotrain.engine.fragment import Fragment
from mpotrain.parallel.ranks import World


class Partition(Protocol):
    """Masters, gradients and low-precision weights of one ZeRO stage."""

    shared: bool
    """Whether every rank owns everything (nothing is split)."""

    def flats(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield what the optimizer updates, with its parameter group."""
        ...

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Return this rank's part of `parameter`, None where it owns none."""
        ...

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the reduced fp32 gradient of this rank's part, between backward and step."""
        ...

    def drop_gradients(self) -> None:
        """Forget what a refused step has left."""
        ...

    def publish(self, parameters: dict[str, nn.Parameter]) -> None:
        """Copy changed masters into the weights that the model computes with (collective)."""
        ...


class WholePartition:
    """Stage 0 in fp32: every rank holds and updates everything; the weight is its own master."""

    shared = True

    def __init__(self, optimizer: torch.optim.Optimizer, world: World) -> None:
        self._optimizer = optimizer
        self._world = world

    def flats(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield the parameters themselves."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                yield group, parameter

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Return the whole parameter."""
        return Fragment(0, parameter.numel(), parameter, 0)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the averaged gradient on rank 0 alone, so that a sum over ranks counts it once."""
        return parameter.grad if self._world.is_main else None

    def drop_gradients(self) -> None:
        """Do nothing: DeepSpeed's step has set all gradients to None."""

    def publish(self, parameters: dict[str, nn.Parameter]) -> None:
        """Do nothing: masters and weights are the same tensors."""


class FlatPartition:
    """Stages 1 and 2, and the optimizer that stage 1 uses for bf16: equal cuts of flat groups."""

    shared = False

    def __init__(self, zero: Any, experts: ExpertShards) -> None:
        self._zero = zero
        self._experts = experts
        # DeepSpeed shows the optimizer one group at a time while it steps: keep them all.
        self._groups: list[dict[str, Any]] = list(zero.optimizer.param_groups)

    def flats(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield this rank's cut of each group."""
        for group in self._groups:
            yield group, group["params"][0]

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Return the part of `parameter` inside this rank's cut."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat: Tensor = self._groups[mapping.param_group_index]["params"][0]
        address = mapping.get_hp_fragment_address()
        start = self._experts.offset(parameter) + mapping.lp_fragment_address.start
        return Fragment(start, address.numel, flat, address.start)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the gradient of the own part."""
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        index = parameter._index_in_param_group  # type: ignore[attr-defined]
        gradient: Tensor = mapping.get_lp_grad_fragment(index).reshape(-1)
        address = mapping.lp_fragment_address
        if gradient.numel() != address.numel:
            # The bf16 optimizer sums whole gradients; the own part of them counts.
            gradient = gradient.narrow(0, address.start, address.numel)
        return gradient

    def drop_gradients(self) -> None:
        """Drop the sums that offload keeps over a step that DeepSpeed gives up for NaN.

        Left alone, the NaN stays in them and every later step is given up as well.
        """
        sums: dict[int, Any] = getattr(self._zero, "averaged_gradients", {})
        for group in sums:
            sums[group] = None

    def publish(self, parameters: dict[str, nn.Parameter]) -> None:
        """Round the own cut and gather those of all ranks."""
        self._zero.update_lp_params()
        # DeepSpeed's own accessors hold views of the old moments: let it link them anew.
        self._zero._hp_optimizer_states_linked = False


class SplitPartition:
    """Stage 3: every parameter is cut into equal parts, one for each rank."""

    shared = False

    def __init__(self, zero: Any, engine: Any, world: World) -> None:
        self._zero = zero
        self._engine = engine
        self._world = world

    def flats(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield the vectors of all sub-groups."""
        groups = self._zero.optimizer.param_groups
        for index, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            yield groups[self._zero.sub_group_to_group_id[index]], flat

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Return this rank's cut of `parameter`; the last ranks may own padding alone."""
        sub_group, flat_start, part = self._address(parameter)
        start = self._world.rank * part
        numel = min(part, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if numel <= 0:
            return None
        flat = self._zero.fp32_partitioned_groups_flat[sub_group]
        return Fragment(start, numel, flat, flat_start)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the gradient of the own cut."""
        fragment = self.fragment(parameter)
        if fragment is None:
            return None
        gradient: Tensor = self._zero.get_local_fp32_grad_for_param(parameter)
        return gradient.narrow(0, 0, fragment.numel)

    def drop_gradients(self) -> None:
        """Do nothing: the next first micro-batch overwrites the sums."""

    def publish(self, parameters: dict[str, nn.Parameter]) -> None:
        """Write the own cuts; whole copies are dropped and gathered again when they are used."""
        self._engine.empty_partition_cache()
        for parameter in parameters.values():
            fragment = self.fragment(parameter)
            if fragment is not None:
                cut: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
                cut.narrow(0, 0, fragment.numel).copy_(fragment.of(fragment.flat))

    def _address(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        address: tuple[int, int, int] = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return address


def partition_of(engine: Any, stage: int, world: World, experts: ExpertShards) -> Partition:
    """Return the partition of an initialised DeepSpeed engine.

    Args:
        engine: a `DeepSpeedEngine`.
        stage: its ZeRO stage.
        world: the ranks.
        experts: which rows of the experts this rank holds.
    """
    if stage == 0:
        return WholePartition(engine.optimizer, world)
    if stage < 3:
        return FlatPartition(engine.optimizer, experts)
    return SplitPartition(engine.optimizer, engine, world)
