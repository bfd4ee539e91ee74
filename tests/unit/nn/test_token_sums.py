"""Losses of a micro-batch from sums over parts of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mpotrain.nn.moe.token_sums import TokenSums

TOP_K = 2


def parts_of(scores: Tensor, kept: Tensor | None) -> TokenSums:
    logs = scores.log_softmax(-1)
    loads = torch.zeros(scores.shape[1], dtype=torch.int64)
    for row in logs.topk(TOP_K, dim=-1).indices.flatten().tolist():
        loads[row] += 1
    return TokenSums.of(scores, logs, loads, kept)


def drawn(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 5, generator=generator, dtype=torch.float64).requires_grad_()


def losses(sums: TokenSums) -> Tensor:
    return sums.balance_loss(TOP_K) + 0.3 * sums.z_loss()


def test_parts_add_up_to_the_whole_micro_batch() -> None:
    one, other = drawn(7, 0), drawn(4, 1)
    kept = torch.rand(4, TOP_K, generator=torch.Generator().manual_seed(2)) > 0.4
    apart = [parts_of(one, None), parts_of(other, kept)]
    messages: list[Tensor] = []

    def send(vector: Tensor) -> Tensor:
        messages.append(vector)
        return vector

    apart[1].over_ranks(send)
    added = apart[0].over_ranks(lambda vector: vector + messages[0])
    whole_scores = torch.cat([one, other]).detach().requires_grad_()
    all_kept = torch.cat([torch.ones(7, TOP_K, dtype=torch.bool), kept])
    whole = parts_of(whole_scores, all_kept)
    assert len(messages) == 1
    torch.testing.assert_close(losses(added), losses(whole), rtol=1e-13, atol=0)
    for name, value in whole.statistics(TOP_K).items():
        torch.testing.assert_close(added.statistics(TOP_K)[name], value)
    assert float(whole.dropped) == float((~kept).sum()) > 0
    (wanted,) = torch.autograd.grad(losses(whole), whole_scores)
    found = torch.autograd.grad(losses(added), (one, other))
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-12, atol=1e-15)


def test_counts_have_no_gradient() -> None:
    sums = parts_of(drawn(3, 4), None)
    sums = sums.over_ranks(lambda vector: vector.clone())
    for name in ("loads", "entropy", "dropped", "tokens"):
        assert not getattr(sums, name).requires_grad, name
    assert sums.probabilities.requires_grad
    assert sums.squares.requires_grad
