"""The optimizer of a rank's parameters, and where an Adam keeps the number of its updates.

AdamW of PyTorch and LAMB count with each parameter; the fused Adam of transformer-engine and apex
counts with each group. Groups that rest now and then have a counter of their own either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpotrain.engine.megatron.extensions import Extensions, fused_adam_class
from mpotrain.engine.state import fresh_adam_state

SETTINGS = ("lr", "betas", "eps", "weight_decay")
"""What AdamW and the fused Adam both read from a group."""


def build_inner(
    reference: torch.optim.Optimizer, groups: list[dict[str, Any]], extensions: Extensions
) -> torch.optim.Optimizer:
    """Build an optimizer that updates as one of the whole network does.

    Args:
        reference: the optimizer of the whole network.
        groups: its groups with this rank's parameters.
        extensions: setting of the engine; a fused Adam takes the place of AdamW.
    """
    fused = fused_adam_class(extensions) if _is_plain_adamw(reference) else None
    if fused is None:
        return type(reference)(groups, lr=0.0)  # type: ignore[call-arg]
    switches = reference.defaults.keys() - set(SETTINGS)
    kept = [{k: v for k, v in group.items() if k not in switches} for group in groups]
    return fused(kept, lr=0.0, bias_correction=True, adam_w_mode=True)  # type: ignore[call-arg]


def counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is a fused Adam, which counts its updates in its groups.

    Those alone have an option `bias_correction`.
    """
    return "bias_correction" in optimizer.defaults


def begin_groups(
    optimizer: torch.optim.Optimizer,
    num_updates: int,
    updates_of: Callable[[dict[str, Any]], int],
) -> None:
    """Set the counters of all groups, where groups count.

    Args:
        optimizer: of a rank's parameters.
        num_updates: updates so far.
        updates_of: returns Adam's counter of a group.
    """
    if not counts_in_groups(optimizer):
        return
    for group in optimizer.param_groups:
        group["step"] = updates_of(group) if num_updates else 0


def begin_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, num_updates: int
) -> dict[str, Tensor]:
    """Return the state of a parameter with zero moments.

    Args:
        optimizer: which kind of Adam.
        group: the parameter's group.
        parameter: what the optimizer updates.
        num_updates: Adam's counter.
    """
    state = fresh_adam_state(group, parameter, num_updates)
    if counts_in_groups(optimizer):
        del state["step"]
    return state


def _is_plain_adamw(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether it is AdamW without the variants that the fused one lacks."""
    groups = optimizer.param_groups
    varied = any(group.get("amsgrad") or group.get("maximize") for group in groups)
    return type(optimizer) is torch.optim.AdamW and not varied
