"""The norm of a gradient that is spread over parameters, roles and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mpotrain.nn.roles import Role

ROLES = tuple(Role)
"""Order of the roles in a vector of sums."""


def squares_by_role(gradients: Iterable[tuple[Role, Tensor]], device: torch.device) -> Tensor:
    """Sum the squares of this rank's gradient elements for each role.

    Args:
        gradients: role and gradient (or the fragment of it that this rank owns), any shape.
        device: where the result lives.

    Returns:
        Sums in the order of `ROLES`, float64 (R,). Norms are taken in fp32
        tensor by tensor; squares are summed over roles and ranks in float64, so that the result
        does not depend on how the gradient is cut.
    """
    groups: dict[Role, list[Tensor]] = {}
    for role, gradient in gradients:
        groups.setdefault(role, []).append(gradient.detach().float())
    sums = torch.zeros(len(ROLES), dtype=torch.float64, device=device)
    for role, tensors in groups.items():
        norm = get_total_norm(tensors).to(device=device, dtype=torch.float64)
        sums[ROLES.index(role)] = norm * norm
    return sums


def norms_by_role(squares: Sequence[float], roles: Iterable[Role]) -> dict[str, float]:
    """Return the norm of each role that occurs in `roles`.

    Args:
        squares: sums of squares over all ranks, in the order of `ROLES`.
        roles: roles of the model's parameters.
    """
    present = set(roles)
    return {
        str(role): math.sqrt(square)
        for role, square in zip(ROLES, squares, strict=True)
        if role in present
    }


def total_norm(squares: Sequence[float]) -> float:
    """Return the L2 norm of the whole gradient; NaN and infinity come through."""
    return math.sqrt(sum(squares))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group its learning rate: `lr` times the group's "lr_factor"."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def check_parameter_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return what makes an optimizer unfit for an engine, one line each.

    Args:
        model: the bare model.
        optimizer: AdamW or LAMB over parameter groups with "lr_factor".
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    counts: dict[int, int] = {}
    found = []
    for index, group in enumerate(optimizer.param_groups):
        if "lr_factor" not in group:
            found.append(f"parameter group {index}: no lr_factor; give it one (1.0 = plain lr)")
        if group.get("amsgrad"):
            found.append(f"parameter group {index}: amsgrad keeps a third moment; turn it off")
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    found += [f"{name}: not in the optimizer" for key, name in names.items() if key not in counts]
    found += [
        f"{names.get(key, 'a parameter outside the model')}: in {count} parameter groups"
        for key, count in counts.items()
        if count > 1 or key not in names
    ]
    return found
