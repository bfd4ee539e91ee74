"""Parameters in groups, and the AdamW that updates them.

Every group carries its `lr_factor`: the engine sets `group["lr"] = lr * group["lr_factor"]` at
each step, with the learning rate that the schedule gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpotrain.nn.roles import CORE_ROLES, Role, role_of
from mpotrain.train.config import AdamWConfig

OWN_RULE_ROLES = CORE_ROLES | {Role.EXPERT}
"""Roles with the learning rate and decay of cores; all others follow the dense rule."""

GROUP_NAMES = ("dense", "dense_no_decay", "cores", "cores_no_decay")
"""Names of all groups in their fixed order; a group without parameters is left out."""


def parameter_groups(model: nn.Module, config: AdamWConfig) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a model into optimizer groups.

    A parameter of one dimension or none (norm weights, biases) never decays. All others do,
    embeddings included, as in GPT ("all non bias or gain weights", Radford et al. 2018): a tied
    embedding is the output matrix as well. Cores are known by their role, never by their name.

    Args:
        model: the bare model; a parameter shared by several modules is taken once, frozen
            parameters (`requires_grad` False) not at all.
        config: decay and factors.

    Returns:
        Groups in the order of `GROUP_NAMES`, without empty ones, each with `name`, `params` (in
        the order of `named_parameters()`), `lr_factor` and `weight_decay`. The order is a
        function of the model alone, so optimizer state can be matched by position.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUP_NAMES}
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_name(parameter)].append(parameter)
    core_decay = config.core_weight_decay
    decay = {
        "dense": config.weight_decay,
        "cores": config.weight_decay if core_decay is None else core_decay,
    }
    return [
        {
            "name": name,
            "params": parameters,
            "lr_factor": config.core_lr_factor if name.startswith("cores") else 1.0,
            "weight_decay": decay.get(name, 0.0),
        }
        for name, parameters in members.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """Build AdamW over the parameter groups of a model.

    The learning rate starts at zero: nothing moves until the engine has set the scheduled one.

    Args:
        model: the bare model, already on the device where it will be updated.
        config: moments, decay and factors.

    Returns:
        AdamW; the fused kernel where all parameters are on CUDA, the plain loop elsewhere.
    """
    groups = parameter_groups(model, config)
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(
        groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused, foreach=False
    )


def _group_name(parameter: nn.Parameter) -> str:
    family = "cores" if role_of(parameter) in OWN_RULE_ROLES else "dense"
    return family if parameter.ndim > 1 else f"{family}_no_decay"
