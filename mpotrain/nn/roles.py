"""What a parameter *is*: one fact that engines, optimizer and checkpoints read.

A layer marks its parameters; nobody else guesses from names. The engine translates the role into
a reduction group, the optimizer into a parameter group and the checkpoint into its manifest.
"""

from __future__ import annotations

from enum import StrEnum

from torch import nn


class Role(StrEnum):
    """Role of a parameter in a tensorized model."""

    DENSE = "dense"
    """An ordinary weight, bias, norm or embedding."""
    CENTRAL = "central"
    """The central tensor of a matrix product operator (the largest core)."""
    AUXILIARY = "auxiliary"
    """Any other core of a matrix product operator."""
    EXPERT = "expert"
    """Private to one expert of a mixture."""
    ADAPTER = "adapter"
    """A small trainable addition to a frozen or shared weight."""


CORE_ROLES = frozenset({Role.CENTRAL, Role.AUXILIARY})
"""Roles of the cores of a matrix product operator."""

_ATTRIBUTE = "_mpotrain_role"


def set_role(parameter: nn.Parameter, role: Role) -> nn.Parameter:
    """Mark `parameter` with `role` and return it."""
    setattr(parameter, _ATTRIBUTE, role)
    return parameter


def role_of(parameter: nn.Parameter) -> Role:
    """Return the role of `parameter`; unmarked parameters are dense."""
    role: Role = getattr(parameter, _ATTRIBUTE, Role.DENSE)
    return role
