"""What the tokens of a micro-batch add up to in a router: losses and statistics come from it.

All of it is sums over tokens, so ranks that each hold some tokens of a micro-batch add theirs up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens, all of one dtype.

    Attributes:
        loads: (token, choice) pairs that chose each expert (E,).
        probabilities: of each expert, differentiable (E,).
        squares: of the log-sum-exp of the scores, differentiable ().
        entropy: of the probabilities, nats ().
        dropped: pairs that found their expert full ().
        tokens: number of tokens ().
    """

    loads: Tensor
    probabilities: Tensor
    squares: Tensor
    entropy: Tensor
    dropped: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, scores: Tensor, logs: Tensor, loads: Tensor, kept: Tensor | None) -> TokenSums:
        """Add up over tokens.

        Args:
            scores: of all experts (N, E).
            logs: their log-softmax (N, E).
            loads: pairs that chose each expert (E,).
            kept: pairs that are not dropped, bool (N, k); None = all.
        """
        probabilities = logs.exp()
        dropped = scores.new_zeros(()) if kept is None else (~kept).sum().to(scores.dtype)
        return cls(
            loads=loads.to(scores.dtype),
            probabilities=probabilities.sum(0),
            squares=scores.logsumexp(-1).square().sum(),
            entropy=-(probabilities.detach() * logs.detach()).sum(),
            dropped=dropped,
            tokens=scores.new_full((), len(scores)),
        )

    def over_ranks(self, add_up: Callable[[Tensor], Tensor]) -> TokenSums:
        """Return the sums over the tokens of several ranks, in one message.

        Args:
            add_up: returns the sum of a vector over the ranks; its gradient decides that of the
                losses.
        """
        parts = (
            self.loads, self.probabilities, self.squares, self.entropy, self.dropped, self.tokens,
        )  # fmt: skip
        joined = add_up(torch.cat([part.reshape(-1) for part in parts]))
        split = torch.split(joined, [part.numel() for part in parts])
        loads, probabilities, squares, entropy, dropped, tokens = (
            total.view(part.shape) for total, part in zip(split, parts, strict=True)
        )
        return TokenSums(
            loads=loads.detach(),
            probabilities=probabilities,
            squares=squares,
            entropy=entropy.detach(),
            dropped=dropped.detach(),
            tokens=tokens.detach(),
        )

    def balance_loss(self, top_k: int) -> Tensor:
        """Return E sum_e f_e P_e (Fedus et al. 2022, eq. 4), with the gradient of P.

        Args:
            top_k: experts of each token.
        """
        share = self.loads / (self.tokens * top_k)
        return len(share) * torch.dot(share, self.probabilities / self.tokens)

    def z_loss(self) -> Tensor:
        """Return the mean squared log-sum-exp of the scores (Zoph et al. 2022, eq. 5)."""
        return self.squares / self.tokens

    @torch.no_grad()
    def statistics(self, top_k: int) -> dict[str, Tensor]:
        """Return the sums that engines add up, fp32, see `MixtureOfExperts`.

        Args:
            top_k: experts of each token.
        """
        sums = {
            "expert_tokens": self.loads,
            "dropped": self.dropped,
            "routed": self.tokens * top_k,
            "balance_loss": self.balance_loss(top_k) * self.tokens,
            "z_loss": self.z_loss() * self.tokens,
            "router_entropy": self.entropy,
            "tokens": self.tokens,
        }
        return {name: value.detach().float() for name, value in sums.items()}
