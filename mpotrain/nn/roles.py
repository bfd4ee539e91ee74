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
    """An ordinary matrix or bias that is private to one expert of a mixture."""
    ADAPTER = "adapter"
    """A small trainable addition to a frozen or shared weight."""
    BUFFER = "buffer"
    """State that training changes without a gradient (selection biases of a router)."""


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


_EXPERTS_ATTRIBUTE = "_mpotrain_experts"


def set_experts(parameter: nn.Parameter, num_experts: int) -> nn.Parameter:
    """Mark the first dimension of `parameter` as running over the experts, and return it.

    What the role says (auxiliary tensor, ordinary matrix) decides learning rate and decay; this
    mark decides who holds it: under expert parallelism a rank keeps some experts' rows, and their
    gradient is reduced over the ranks that keep the same ones.

    Args:
        parameter: whole parameter (E, ...).
        num_experts: E, all experts of the mixture whatever a rank holds of them.
    """
    setattr(parameter, _EXPERTS_ATTRIBUTE, num_experts)
    return parameter


def experts_of(parameter: nn.Parameter) -> int:
    """Return the number of experts that the first dimension runs over; 0 without such a one."""
    count: int = getattr(parameter, _EXPERTS_ATTRIBUTE, 0)
    return count
