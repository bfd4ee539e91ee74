"""The token embedding, tied to the output layer, with its rows shared out over ranks.

Every tensor-parallel rank holds a block of ceil(V / p) token ids. The last blocks are filled up
with rows of zeros that no token has; softmax and comparison leave their scores out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mpotrain.engine.megatron.placement import Cut
from mpotrain.engine.megatron.slots import LogicalModule, Slots


class VocabularyEmbedding(LogicalModule):
    """This rank's rows of the token embedding.

    The stage that computes scores builds one for its `weight` alone.

    Attributes:
        first_id: the first token id of this rank.
        num_rows: rows that it holds, padding included.
    """

    def __init__(
        self,
        slots: Slots,
        name: str,
        vocab_size: int,
        hidden_size: int,
        config: TransformerConfig,
    ) -> None:
        """Make the parameter.

        Args:
            slots: makes the parameters of the chunk.
            name: logical name of the matrix.
            vocab_size: V.
            hidden_size: H.
            config: of the chunk.

        Raises:
            ValueError: the network's matrix is not (V, H).
        """
        super().__init__()
        self.vocab_size = vocab_size
        parts = int(config.tensor_model_parallel_size)
        rank = parallel_state.get_tensor_model_parallel_rank()
        self.num_rows = -(-vocab_size // parts)
        self.first_id = rank * self.num_rows
        cuts = [Cut(0, parts, rank, padded=parts * self.num_rows)] if parts > 1 else []
        slots.add(self, "weight", name, *cuts)
        held = tuple(self.read("weight").shape)
        if held != (self.num_rows, hidden_size):
            expected = (self.num_rows, hidden_size)
            raise ValueError(f"{name}: a rank holds {held}, expected {expected} rows by columns")

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embedding (B, T, H) of tokens (B, T), whole on every tensor-parallel rank."""
        own = tokens - self.first_id
        is_elsewhere = (own < 0) | (own >= self.num_rows)
        rows = functional.embedding(own.masked_fill(is_elsewhere, 0), self.read("weight"))
        rows = rows.masked_fill(is_elsewhere[..., None], 0.0)
        whole: Tensor = reduce_from_tensor_model_parallel_region(rows)
        return whole


def vocabulary_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the scores of this rank's token ids; those of padded ids have no meaning.

    Args:
        hidden: (..., H), the same on all tensor-parallel ranks.
        weight: `weight` of the `VocabularyEmbedding` (V', H).
        bias: cut and padded like the rows of `weight` (V',).

    Returns:
        (..., V') in the dtype of `hidden`. The gradient of `hidden` is summed over the ranks.
    """
    shift = None if bias is None else bias.to(hidden.dtype)
    copied = copy_to_tensor_model_parallel_region(hidden)
    return functional.linear(copied, weight.to(hidden.dtype), shift)


def vocabulary_loss(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the cross-entropy of every target, in fp32 or the wider dtype of the scores.

    Megatron-core's own function knows no padding, computes in fp32 whatever it is given, and
    changes scores in fp32 in place; here one reduction carries both sums.

    Args:
        logits: scores of this rank's ids (N, V').
        targets: token ids (N,). Those that no rank holds (-100) get a number without meaning.
        vocab_size: V; ids from V on are padding.

    Returns:
        (N,), the same on all tensor-parallel ranks.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets, vocab_size)  # type: ignore[no-untyped-call]
    return loss


def vocabulary_correct(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return which targets have the highest score of all ids; ties go to the smallest id.

    Args:
        logits: scores of this rank's ids (N, V').
        targets: token ids (N,).
        vocab_size: V; ids from V on are padding.

    Returns:
        bool (N,), the same on all tensor-parallel ranks.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    first_id, num_valid = _own_ids(logits.shape[-1], vocab_size)
    valid = logits.detach()[:, :num_valid]
    # Without a token of its own a rank offers what nobody prefers to a score.
    highest = torch.full((len(targets),), float("-inf"), device=logits.device)
    best = torch.full_like(targets, vocab_size)
    if num_valid:
        top = valid.argmax(-1)
        # argmax of scores in 16 bits equals that of the same numbers in 32.
        highest = highest.to(torch.promote_types(logits.dtype, torch.float32))
        highest.copy_(valid.gather(-1, top[:, None])[:, 0])
        best = top + first_id
    every_highest = highest.new_empty(group.size() * len(targets))
    every_best = best.new_empty(group.size() * len(targets))
    dist.all_gather_into_tensor(every_highest, highest, group=group)
    dist.all_gather_into_tensor(every_best, best, group=group)
    # argmax takes the first of equals: the rank with the smallest ids.
    winner = every_highest.view(group.size(), -1).argmax(0)
    chosen = every_best.view(group.size(), -1).gather(0, winner[None])[0]
    return chosen == targets


def counted_loss(
    logits: Tensor, targets: Tensor, counts: Tensor, vocab_size: int, *, training: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed loss of the targets that count, and what a `Tally` takes of them.

    Args:
        logits: scores of this rank's ids (N, V').
        targets: token ids (N,).
        counts: bool (N,).
        vocab_size: V.
        training: else the right predictions are counted, too.
    """
    losses = vocabulary_loss(logits, targets, vocab_size)
    loss = torch.where(counts, losses, torch.zeros_like(losses)).sum()
    sums = {"loss_sum": loss.detach()}
    if not training:
        sums["correct"] = (vocabulary_correct(logits, targets, vocab_size) & counts).sum()
    return loss, sums


def _own_ids(width: int, vocab_size: int) -> tuple[int, int]:
    """Return the first id of this rank, which has `width`, and how many of its ids are tokens."""
    first_id = parallel_state.get_tensor_model_parallel_rank() * width
    return first_id, min(max(vocab_size - first_id, 0), width)


class _CrossEntropy(torch.autograd.Function):
    """`log(sum(exp(z))) - z[target]` over ids that lie on several ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        first_id, num_valid = _own_ids(logits.shape[-1], vocab_size)
        valid = logits[:, :num_valid].to(torch.promote_types(logits.dtype, torch.float32))
        highest = valid.amax(-1) if num_valid else valid.new_full((len(valid),), float("-inf"))
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        shifted = valid - highest[:, None]
        own = targets - first_id
        is_here = (own >= 0) & (own < num_valid)
        rows, columns = is_here.nonzero()[:, 0], own[is_here]
        sums = valid.new_zeros(2, len(own))
        sums[0, rows] = shifted[rows, columns]
        weights = shifted.exp_()
        sums[1] = weights.sum(-1)
        dist.all_reduce(sums, group=group)
        weights /= sums[1, :, None]
        ctx.save_for_backward(weights, rows, columns)
        ctx.width, ctx.dtype = logits.shape[-1], logits.dtype
        return sums[1].log() - sums[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None]:
        weights, rows, columns = ctx.saved_tensors
        d_valid = weights * d_loss[:, None]
        d_valid[rows, columns] -= d_loss[rows]
        padding = ctx.width - d_valid.shape[-1]
        return functional.pad(d_valid.to(ctx.dtype), (0, padding)), None, None
