"""Where the modules of a chunk get their parameters: their own, or those that layers share.

A chunk is what one pipeline stage (or virtual stage) holds of a network. A tensor that several
layers use exists once in a chunk, in its bank; layers refer to it and do not register it, so it
has one gradient and one place in every buffer. They read it by calling the module that owns it:
an engine that gathers weights ahead of their use waits in that call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpotrain.engine.megatron.placement import Cut, Placement, place, placement_of
from mpotrain.nn.roles import Role


class SharedTensor(nn.Module):
    """One tensor that several layers use.

    Attributes:
        tensor: the parameter.
    """

    def __init__(self, tensor: nn.Parameter) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self) -> Tensor:
        """Return the parameter."""
        return self.tensor


@dataclass(frozen=True)
class Whole:
    """A logical tensor of the network.

    Attributes:
        shape: whole shape.
        role: what it is.
        num_experts: experts that its first dimension runs over; 0 = none.
    """

    shape: tuple[int, ...]
    role: Role
    num_experts: int = 0


class Slots:
    """Makes the parameters of one chunk.

    Attributes:
        bank: owns what several layers use; the chunk registers it as a module.
    """

    def __init__(
        self,
        wholes: Mapping[str, Whole],
        *,
        shared: Collection[str] = (),
        copied: Collection[str] = (),
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Prepare.

        Args:
            wholes: all logical tensors of the network.
            shared: names of those that several layers use: they live in the bank.
            copied: names of those of which other chunks or stages hold a copy.
            device: of the parameters.
            dtype: of the parameters.
        """
        self._wholes, self._shared, self._copied = wholes, frozenset(shared), frozenset(copied)
        self._device, self._dtype = device, dtype
        self.bank = nn.ModuleDict()

    def has(self, name: str) -> bool:
        """Return whether the network has a tensor of this name."""
        return name in self._wholes

    def add(
        self,
        owner: LogicalModule,
        attribute: str,
        name: str,
        *cuts: Cut,
        is_partial: bool = False,
        is_expert: bool = False,
    ) -> None:
        """Give a module a parameter, to be read by `owner.read(attribute)`; values are zeros.

        Args:
            owner: the module.
            attribute: its name there.
            name: logical name.
            cuts: what the rank holds of it; cuts into one part are left out.
            is_partial: see `Placement`.
            is_expert: see `Placement`.
        """
        key = name.replace(".", "/")
        whole = self._wholes[name]
        placement = Placement(
            name,
            whole.shape,
            whole.role,
            tuple(cut for cut in cuts if cut.parts > 1 or cut.padded is not None),
            is_partial,
            is_expert,
            name in self._copied,
            whole.num_experts,
        )
        if key in self.bank:
            held = placement_of(next(self.bank[key].parameters()))
            if held != placement:
                raise ValueError(f"{name} is held as {held}, but another layer needs {placement}")
            owner.refer(attribute, self.bank[key])
            return
        values = torch.zeros(placement.local_shape, dtype=self._dtype, device=self._device)
        parameter = place(nn.Parameter(values), placement)
        if name in self._shared:
            self.bank[key] = SharedTensor(parameter)
            owner.refer(attribute, self.bank[key])
        else:
            owner.register_parameter(attribute, parameter)


class LogicalModule(nn.Module):
    """A module whose parameters come from `Slots`, so any of them may be shared with others."""

    def __init__(self) -> None:
        super().__init__()
        # A plain dict: what is referred to is registered by the bank alone.
        self._references: dict[str, nn.Module] = {}

    def refer(self, attribute: str, owner: nn.Module) -> None:
        """Read `attribute` from another module from now on."""
        self._references[attribute] = owner

    def owns(self, attribute: str) -> bool:
        """Return whether there is such a parameter, own or shared."""
        return attribute in self._references or attribute in self._parameters

    def awaited(self, attribute: str) -> Tensor:
        """Return a parameter where it is used outside this module's forward pass.

        An engine that gathers weights ahead of their use waits for them in the hooks that run
        before a forward pass; so they run here too.
        """
        for hook in self._forward_pre_hooks.values():
            hook(self, ())
        return self.read(attribute)

    def read(self, attribute: str) -> Tensor:
        """Return a parameter, own or shared."""
        owner = self._references.get(attribute)
        value: Tensor = getattr(self, attribute) if owner is None else owner()
        return value
