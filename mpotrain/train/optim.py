"""Parameters in groups, and the optimizer that updates them.

Every group carries its `lr_factor`: the engine sets `group["lr"] = lr * group["lr_factor"]` at
each step, with the learning rate that the schedule gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpotrain.engine.central_mask import CENTRAL
from mpotrain.engine.config import NO_MASK, CentralMaskConfig
from mpotrain.nn.roles import CORE_ROLES, Role, experts_of, role_of
from mpotrain.train.config import AdamWConfig, LambConfig
from mpotrain.train.lamb import Lamb

CENTRAL_GROUP = CENTRAL
"""Name of the group of masked central tensors, and how the names of single ones begin."""

GROUP_NAMES = (
    "dense",
    "dense_no_decay",
    "cores",
    "cores_no_decay",
    CENTRAL_GROUP,
    "expert_dense",
    "expert_dense_no_decay",
    "expert_cores",
    "expert_cores_no_decay",
)
"""Names of all groups in their fixed order; a group without parameters is left out. In place of
`central` there may be one group `central:<logical name>` for each central tensor."""


def parameter_groups(
    model: nn.Module, config: AdamWConfig | LambConfig, mask: CentralMaskConfig = NO_MASK
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a model into optimizer groups.

    A parameter of one dimension or none (norm weights, biases) never decays. All others do,
    embeddings included, as in GPT ("all non bias or gain weights", Radford et al. 2018): a tied
    embedding is the output matrix as well. The dimension that runs over experts does not count, so
    their biases (E, J) do not decay. Cores are known by their role, never by their name; matrices
    of dense experts follow the rule of all other matrices.

    Parameters with rows for each expert stand in groups of their own, because engines reduce their
    gradients over other ranks. So do central tensors where an update can be masked: all in one
    group, or each in its own where each has its own draw (granularity "tensor").

    Args:
        model: the bare model; a parameter shared by several modules is taken once, frozen
            parameters (`requires_grad` False) not at all.
        config: decay and factors.
        mask: random rest of central tensors; with probability 0 they are cores like others.

    Returns:
        Groups in the order of `GROUP_NAMES`, without empty ones, each with `name`, `params` (in
        the order of `named_parameters()`), `lr_factor` and `weight_decay`; `experts` (True) in
        groups of expert parameters, `central` (logical names of `params`) in those of masked
        central tensors, and under LAMB `adapt` (whether trust scales the update). The order is a
        function of the model and the configuration alone, so optimizer state can be matched by
        position.
    """
    members: dict[str, dict[str, nn.Parameter]] = {name: {} for name in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_name(parameter, mask)][name] = parameter
    groups = []
    for name, parameters in members.items():
        rule = _rule(name, config)
        if name == CENTRAL_GROUP:
            groups += _central_groups(parameters, rule, mask)
        elif parameters:
            groups.append({"name": name, "params": list(parameters.values()), **rule})
    return groups


def build_optimizer(
    model: nn.Module,
    config: AdamWConfig | LambConfig,
    mask: CentralMaskConfig = NO_MASK,
    *,
    device: torch.device | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer over the parameter groups of a model.

    The learning rate starts at zero: nothing moves until the engine has set the scheduled one.

    Args:
        model: the bare model.
        config: which optimizer; its moments, decay and factors.
        mask: see `parameter_groups`; the engine makes the draws.
        device: where the parameters will be when they are updated (an engine may move them there
            after it has cut them); by default where they are.

    Returns:
        LAMB, or AdamW: the fused kernel on CUDA, the plain loop elsewhere.
    """
    groups = parameter_groups(model, config, mask)
    if isinstance(config, LambConfig):
        return Lamb(
            groups, lr=0.0, betas=config.betas, eps=config.eps,
            min_trust=config.min_trust, max_trust=config.max_trust,
        )  # fmt: skip
    places = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = (places if device is None else {device.type}) == {"cuda"}
    return torch.optim.AdamW(
        groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused, foreach=False
    )


def _group_name(parameter: nn.Parameter, mask: CentralMaskConfig) -> str:
    role, per_expert = role_of(parameter), experts_of(parameter) > 0
    if role is Role.CENTRAL and mask.probability > 0 and not per_expert:
        return CENTRAL_GROUP
    family = "cores" if role in CORE_ROLES else "dense"
    decays = parameter.ndim - per_expert > 1
    return f"{'expert_' if per_expert else ''}{family}{'' if decays else '_no_decay'}"


def _rule(name: str, config: AdamWConfig | LambConfig) -> dict[str, Any]:
    """Return learning rate and decay of a group, and the marks of expert and of adapted ones."""
    per_expert = name.startswith("expert_")
    is_core = name.startswith(CENTRAL_GROUP) or "cores" in name
    decay = config.weight_decay
    if is_core and config.core_weight_decay is not None:
        decay = config.core_weight_decay
    rule: dict[str, Any] = {
        "lr_factor": config.core_lr_factor if is_core else 1.0,
        "weight_decay": 0.0 if name.endswith("_no_decay") else decay,
    }
    if isinstance(config, LambConfig):
        rule["adapt"] = config.adapt_vectors or not name.endswith("_no_decay")
    return rule | {"experts": True} if per_expert else rule


def _central_groups(
    parameters: dict[str, nn.Parameter], rule: dict[str, Any], mask: CentralMaskConfig
) -> list[dict[str, Any]]:
    if mask.granularity == "tensor":
        return [
            {"name": f"{CENTRAL_GROUP}:{name}", "params": [parameter], **rule, CENTRAL: [name]}
            for name, parameter in parameters.items()
        ]
    if not parameters:
        return []
    names, tensors = list(parameters), list(parameters.values())
    return [{"name": CENTRAL_GROUP, "params": tensors, **rule, CENTRAL: names}]
