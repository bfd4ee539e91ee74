"""A mixture of experts token by token, in plain Python and plain autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    MPOExpertSite,
    RouterConfig,
)
from mpotrain.nn.moe.dispatch import LocalDispatcher
from mpotrain.nn.moe.experts import DenseExperts, MPOExperts
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.moe.router import Router
from mpotrain.tensor.contract import rebuild

HIDDEN, FFN = 12, 24
Site = DenseExpertSite | MPOExpertSite | AsymmetricExpertSite
SITES: dict[str, tuple[Site, Site]] = {
    "dense": (DenseExpertSite(), DenseExpertSite()),
    "mpo": (
        MPOExpertSite(
            start="independent", in_modes=(3, 1, 2, 2, 1), out_modes=(2, 2, 3, 1, 2), cap=6
        ),
        MPOExpertSite(
            start="independent",
            in_modes=(2, 3, 4),
            out_modes=(3, 2, 2),
            bonds=(5, 6),
            init="balanced",
        ),
    ),
    "asymmetric": (
        AsymmetricExpertSite(start="independent", in_mode=4, out_mode=6, in_bond=2, out_bond=5),
        AsymmetricExpertSite(start="independent", in_mode=6, out_mode=3, bias=False),
    ),
}


def experts(
    site: Site, in_features: int, out_features: int, num_experts: int, generator: torch.Generator
) -> DenseExperts | MPOExperts:
    spec = site.spec(in_features, out_features)
    if isinstance(site, DenseExpertSite) or spec is None:
        return DenseExperts(
            in_features, out_features, num_experts, bias=site.bias, std=0.3, generator=generator
        )
    return MPOExperts(spec, site, num_experts, bias=site.bias, std=0.3, generator=generator)


def mixture(
    kind: str, config: RouterConfig, num_experts: int = 5, *, seed: int = 0
) -> MixtureOfExperts:
    """A float64 mixture with non-zero biases."""
    generator = torch.Generator().manual_seed(seed)
    c_fc, c_proj = SITES[kind]
    module = MixtureOfExperts(
        Router(HIDDEN, num_experts, config, std=0.7, generator=generator),
        experts(c_fc, HIDDEN, FFN, num_experts, generator),
        experts(c_proj, FFN, HIDDEN, num_experts, generator),
        LocalDispatcher(num_experts),
    ).double()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return module


def expert_weights(layer: DenseExperts | MPOExperts) -> list[Tensor]:
    """The matrix (I, J) of every expert."""
    if isinstance(layer, DenseExperts):
        return list(layer.weight)
    c, result = layer.spec.central_index, []
    for e in range(len(layer.auxiliaries[0])):
        cores = [core[e] for core in layer.auxiliaries]
        result.append(rebuild([*cores[:c], layer.central, *cores[c:]], layer.spec))
    return result


@dataclass
class Reference:
    y: Tensor
    auxiliary_loss: Tensor
    statistics: dict[str, Tensor]
    choices: list[list[int]]
    kept: list[list[bool]]


def reference(module: MixtureOfExperts, x: Tensor, noise: Tensor | None = None) -> Reference:
    """Compute `module(x)` for x (B, T, H), with `noise` (B T, H) on the router's input."""
    router, config = module.router, module.router.config
    tokens = list(x.reshape(-1, x.shape[-1]))
    num_tokens, num_experts = len(tokens), router.num_experts
    logs, square = [], torch.zeros((), dtype=x.dtype)
    for n, token in enumerate(tokens):
        seen = token if noise is None else token * noise[n]
        scores = router.weight @ seen + (0 if router.bias is None else router.bias)
        total = scores.exp().sum().log()
        logs.append(scores - total)
        square = square + total**2
    choices = [_choose(log.exp(), router.balance, config.top_k) for log in logs]
    kept = _keep(choices, num_experts, _factor(config, module.training))
    first, second = expert_weights(module.c_fc), expert_weights(module.c_proj)
    rows = []
    for n, token in enumerate(tokens):
        gates = _gates(logs[n], choices[n], config)
        row = torch.zeros_like(token)
        for c, e in enumerate(choices[n]):
            if not kept[n][c]:
                continue
            at_input = config.gate_at == "input"
            inside = (token * gates[c] if at_input else token) @ first[e]
            inside = _gelu(inside + (0 if module.c_fc.bias is None else module.c_fc.bias[e]))
            out = inside @ second[e] + (0 if module.c_proj.bias is None else module.c_proj.bias[e])
            row = row + (out if at_input else out * gates[c])
        rows.append(row)
    pairs = [e for chosen in choices for e in chosen]
    loads = torch.tensor([float(pairs.count(e)) for e in range(num_experts)])
    mean = sum(log.exp() for log in logs) / num_tokens
    balance = num_experts * sum(loads[e].item() / len(pairs) * mean[e] for e in range(num_experts))
    z = square / num_tokens
    statistics = {
        "expert_tokens": loads,
        "dropped": torch.tensor(float(sum(not k for row in kept for k in row))),
        "routed": torch.tensor(float(len(pairs))),
        "balance_loss": balance.detach() * num_tokens,
        "z_loss": z.detach() * num_tokens,
        "router_entropy": sum(-(log.exp() * log).sum() for log in logs).detach(),
        "tokens": torch.tensor(float(num_tokens)),
    }
    auxiliary = config.balance_loss * balance + config.z_loss * z
    return Reference(torch.stack(rows).view(x.shape), auxiliary, statistics, choices, kept)


def _choose(probabilities: Tensor, balance: Tensor | None, top_k: int) -> list[int]:
    shifted = probabilities.detach() + (0 if balance is None else balance)
    return sorted(range(len(shifted)), key=lambda e: (-shifted[e].item(), e))[:top_k]


def _factor(config: RouterConfig, training: bool) -> float | None:
    return config.capacity_factor if training else config.eval_capacity_factor


def _keep(choices: list[list[int]], num_experts: int, factor: float | None) -> list[list[bool]]:
    kept = [[True] * len(chosen) for chosen in choices]
    if factor is None:
        return kept
    top_k = len(choices[0])
    room = [math.ceil(round(factor * top_k * len(choices), 6) / num_experts)] * num_experts
    for c in range(top_k):
        for n, chosen in enumerate(choices):
            kept[n][c] = room[chosen[c]] > 0
            room[chosen[c]] -= kept[n][c]
    return kept


def _gates(log: Tensor, chosen: list[int], config: RouterConfig) -> list[Tensor]:
    p = [log[e].exp() for e in chosen]
    if config.top_k > 1 and config.normalise:
        return [value / sum(p) for value in p]
    if config.top_k == 1 and config.gate == "straight_through":
        return [p[0] / p[0].detach()]
    return p


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
