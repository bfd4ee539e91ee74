"""Which experts a token goes to, with what factor, and what keeps the loads of the experts even.

Everything is computed in fp32 (float64 for float64 inputs): the choice is discontinuous, and
rounding of the scores to 16 bits is known to destabilise training (Fedus et al. 2022, section 2.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.nn.moe.config import RouterConfig
from mpotrain.nn.moe.token_sums import TokenSums


@dataclass(frozen=True)
class Routing:
    """What the router decided for the N tokens of a micro-batch.

    Attributes:
        experts: experts of each token, best first, int64 (N, k).
        gates: factors of these experts, differentiable, fp32 (N, k).
        kept: which (token, choice) pairs fit the capacity, bool (N, k); None = all of them.
        auxiliary_loss: weighted balance and z-loss, a mean over the micro-batch, fp32 scalar.
        statistics: detached fp32 sums, see `MixtureOfExperts`.
    """

    experts: Tensor
    gates: Tensor
    kept: Tensor | None
    auxiliary_loss: Tensor
    statistics: dict[str, Tensor]


class ExpertChoice(nn.Module):
    """What a router does with its scores: everything but the weights that they come from.

    Attributes:
        balance: buffer (E,), fp32: what is added to the probabilities for the choice alone (Wang
            et al. 2024, arXiv 2408.15664); None without `balance_rate`.
        keeps_all: drop no token whatever the capacity; set for generation, where the token that
            counts is the newest and would be the first to be dropped.
    """

    balance: Tensor | None

    def __init__(self, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.num_experts, self.config = num_experts, config
        self.keeps_all = False
        balanced = config.balance_rate > 0
        self.register_buffer("balance", torch.zeros(num_experts) if balanced else None)

    def score(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the scores (.., E) of all experts for the tokens x (.., H), fp32.

        Args:
            x: tokens.
            weight: (E, H).
            bias: (E,), or None.
        """
        dtype = torch.promote_types(torch.float32, x.dtype)
        bias = None if bias is None else bias.to(dtype)
        return functional.linear(self._jittered(x.to(dtype)), weight.to(dtype), bias)

    def route(self, scores: Tensor) -> Routing:
        """Choose the experts of the tokens with these scores (N, E)."""
        logs = functional.log_softmax(scores, dim=-1)
        experts = self._choose(logs.detach().exp())
        loads = _loads(experts, self.num_experts)
        kept = self._within_capacity(experts, loads)
        sums = self._of_micro_batch(TokenSums.of(scores, logs, loads, kept))
        top_k = self.config.top_k
        return Routing(
            experts=experts,
            gates=self._gates(logs.gather(1, experts)),
            kept=kept,
            auxiliary_loss=self._weighted(sums.balance_loss(top_k), sums.z_loss()),
            statistics=sums.statistics(top_k),
        )

    @torch.no_grad()
    def update_balance(self, expert_tokens: Tensor) -> None:
        """Move every selection bias one step towards even loads (Wang et al. 2024, algorithm 1).

        ``balance += rate * sign(mean load - load)``. Without `balance_rate` nothing happens.

        Args:
            expert_tokens: pairs that chose each expert in the last step, over all ranks, (E,).

        Raises:
            ValueError: the loads are not those of this router's experts.
        """
        if self.balance is None:
            return
        if expert_tokens.shape != self.balance.shape:
            raise ValueError(
                f"loads {tuple(expert_tokens.shape)} do not fit {self.num_experts} experts"
            )
        loads = expert_tokens.to(self.balance.device, torch.float64)
        self.balance += self.config.balance_rate * torch.sign(loads.mean() - loads).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # An engine that casts the model to bf16 must not touch the selection biases: their step
        # (1e-3) is below the resolution of bf16 near 1, and they would stop moving.
        before = self.balance
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.balance is not None and self.balance.dtype != before.dtype:
            self.balance = before.to(self.balance.device)
        return result

    def _jittered(self, x: Tensor) -> Tensor:
        """Multiply x by uniform noise around 1 in training (Fedus et al. 2022, section 2.4)."""
        jitter = self.config.jitter
        if not self.training or jitter == 0:
            return x
        return x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)

    def _choose(self, probabilities: Tensor) -> Tensor:
        """Return the k best experts (N, k); of equal ones the first (which topk does not say)."""
        preference = probabilities
        if self.balance is not None:
            preference = preference + self.balance.to(preference.dtype)
        chosen = [preference.argmax(dim=-1, keepdim=True)]
        while len(chosen) < self.config.top_k:
            preference = preference.scatter(1, chosen[-1], -math.inf)
            chosen.append(preference.argmax(dim=-1, keepdim=True))
        return torch.cat(chosen, dim=1)

    def _gates(self, chosen: Tensor) -> Tensor:
        """Return the factors (N, k) from the log-probabilities (N, k) of the chosen experts."""
        if self.config.top_k > 1 and self.config.normalise:
            # Equal to p / sum(p), without 0 / 0 where selection biases chose improbable experts.
            return chosen.softmax(dim=-1)
        if self.config.top_k == 1 and self.config.gate == "straight_through":
            # p / p.detach(): exactly 1 with the gradient of log p.
            return 1 + (chosen - chosen.detach())
        return chosen.exp()

    def _within_capacity(self, experts: Tensor, loads: Tensor) -> Tensor | None:
        """Return which pairs (N, k) fit, first choices of all tokens before second ones (GShard).

        At most ``ceil(factor * k * N / E)`` pairs of an expert fit.
        """
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is None or self.keeps_all:
            return None
        # Exact arithmetic on the decimal that the user wrote: in floats 1.1 * 10 is above 11.
        capacity = math.ceil(Fraction(str(factor)) * experts.numel() / self.num_experts)
        by_choice = experts.t().reshape(-1)
        order = by_choice.argsort(stable=True)
        starts = loads.cumsum(0) - loads
        place = torch.arange(len(order), device=order.device) - starts[by_choice[order]]
        kept = torch.empty_like(order, dtype=torch.bool)
        kept[order] = place < capacity
        return kept.view(experts.shape[1], -1).t()

    def _weighted(self, balance_loss: Tensor, z_loss: Tensor) -> Tensor:
        total = torch.zeros_like(balance_loss)
        if self.config.balance_loss > 0:
            total = total + self.config.balance_loss * balance_loss
        if self.config.z_loss > 0:
            total = total + self.config.z_loss * z_loss
        return total

    def _of_micro_batch(self, sums: TokenSums) -> TokenSums:
        """Return the sums over all tokens of the micro-batch; here there are no others."""
        return sums


class Router(ExpertChoice):
    """Linear scores, softmax, and the k most probable experts.

    Attributes:
        weight: parameter (E, H).
        bias: parameter (E,) or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        config: RouterConfig,
        *,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_experts, config)
        weight = torch.empty(num_experts, hidden_size)
        self.weight = nn.Parameter(weight.normal_(0.0, std, generator=generator))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(num_experts)) if config.bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (N, E) of all experts for the tokens x (N, H), fp32.

        All that the parameters do; ZeRO-3 gathers weights around calls whose results are tensors.
        """
        return self.score(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the router in `print(model)`."""
        return f"{self.weight.shape[1]} -> top {self.config.top_k} of {self.num_experts}"


def keep_all_tokens(model: nn.Module) -> None:
    """Let no router of `model` drop a token from here on."""
    for module in model.modules():
        if isinstance(module, ExpertChoice):
            module.keeps_all = True


def _loads(experts: Tensor, num_experts: int) -> Tensor:
    """Return how many pairs chose each expert, int64 (E,), without atomics or a host round trip."""
    numbers = torch.arange(num_experts, device=experts.device)
    return (experts.reshape(-1, 1) == numbers).sum(0)
