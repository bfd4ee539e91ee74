"""Sampling text from a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol, cast

import torch
from torch import Tensor, nn


class CausalModel(Protocol):
    """What sampling needs of a model."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return hidden states (B, T, H) of tokens (B, T)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return scores (..., V) of hidden states (..., H)."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: tokens to add to the prompt.
        temperature: 0 takes the likeliest token; higher is more random.
        top_k: draw among the k likeliest tokens; None for all.
        top_p: draw among the likeliest tokens that together hold this probability.
        seed: of the random draws; the same seed gives the same text.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def problems(self) -> list[str]:
        """Return every impossible value, one line each."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"tokens: must be at least 1, is {self.max_new_tokens}")
        if not 0 <= self.temperature < inf:
            found.append(f"temperature: must be 0 or more, is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top-k: must be at least 1, is {self.top_k}")
        if not 0 < self.top_p <= 1:
            found.append(f"top-p: must be in (0, 1], is {self.top_p}")
        return found


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    context_length: int,
    vocab_size: int,
    stop_token: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue a prompt token by token.

    Args:
        model: a model with `hidden` and `logits`.
        prompt: token ids, at least one.
        sampling: how tokens are drawn.
        context_length: longest sequence the model can read; older tokens fall out of sight.
        vocab_size: ids of the tokenizer; a model may have padding rows beyond, never drawn.
        stop_token: end the text at this token.
        on_token: called with every new token.

    Returns:
        The new tokens, without the prompt and without the stop token.
    """
    causal = cast("CausalModel", model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    tokens, new = list(prompt), []
    try:
        for _ in range(sampling.max_new_tokens):
            window = torch.tensor([tokens[-context_length:]], device=device)
            scores = causal.logits(causal.hidden(window)[:, -1])[0, :vocab_size]
            token = _draw(scores.float().cpu(), sampling, generator)
            if token == stop_token:
                break
            tokens.append(token)
            new.append(token)
            if on_token is not None:
                on_token(token)
    finally:
        model.train(was_training)
    return new


def _draw(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token from scores (V,)."""
    if sampling.temperature <= 0:
        return int(scores.argmax())
    scores = scores / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scores):
        threshold = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    probabilities, order = scores.softmax(-1).sort(descending=True)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
