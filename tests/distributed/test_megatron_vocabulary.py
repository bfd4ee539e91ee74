"""Token embedding, scores and loss over a vocabulary that lies on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed.megatron_comparison import (
    difference,
    draw,
    load,
    make_config,
    make_slots,
    whole_gradients,
)
from distributed.megatron_grid import megatron_grid
from torch import Tensor
from torch.nn import functional

from mpotrain.batch import Batch
from mpotrain.models.token_loss import token_loss
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

Run = Callable[[int], Callable[..., list[Any]]]
NAME, BIAS, HIDDEN = "token_embedding.weight", "head.bias", 6
TOLERANCE = 1e-12


def parts_of(
    tensor: int, vocab_size: int, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any, dict[str, Tensor]]:
    """Embedding and bias of this rank, loaded, and the whole tensors."""
    from megatron.core import parallel_state

    from mpotrain.engine.megatron.placement import Cut
    from mpotrain.engine.megatron.slots import LogicalModule
    from mpotrain.engine.megatron.vocabulary import VocabularyEmbedding

    # All scores are negative and padded ids would score highest if they were counted.
    tensors = {NAME: draw(vocab_size, HIDDEN, seed=1), BIAS: draw(vocab_size, seed=2) - 9.0}
    slots = make_slots(tensors, dtype=dtype)
    config = make_config(ParallelConfig(tensor=tensor), params_dtype=dtype)
    embedding = VocabularyEmbedding(slots, NAME, vocab_size, HIDDEN, config)
    head = LogicalModule()
    rank = parallel_state.get_tensor_model_parallel_rank()
    rows = tensor * embedding.num_rows
    slots.add(head, "bias", BIAS, Cut(0, tensor, rank, padded=rows))
    load(embedding, tensors)
    load(head, tensors)
    return embedding, head, tensors


def compare_with_dense(
    world: World, tensor: int, vocab_size: int, placed: str, width: int = 0
) -> dict[str, float]:
    """Differences of embedding, loss and all gradients from one dense vocabulary."""
    with megatron_grid(world, ParallelConfig(tensor=tensor)):
        from mpotrain.engine.megatron.vocabulary import vocabulary_logits, vocabulary_loss

        embedding, head, tensors = parts_of(tensor, vocab_size)
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(vocab_size, (3, 7), generator=generator)
        targets = torch.randint(vocab_size, (11,), generator=generator)
        if placed == "first rank":
            targets = targets % embedding.num_rows
        elif placed == "last id":
            targets = torch.full_like(targets, vocab_size - 1)
        elif placed == "none":
            targets = targets[:0]
        hidden, up = draw(len(targets), HIDDEN, seed=4), draw(len(targets), seed=5)
        up_rows = draw(3, 7, HIDDEN, seed=6)

        weight, bias = (tensors[n].clone().requires_grad_() for n in (NAME, BIAS))
        x = hidden.clone().requires_grad_()
        rows = functional.embedding(tokens, weight)
        scores = functional.linear(x, weight, bias)
        expected = functional.cross_entropy(scores, targets, reduction="none")
        ((expected * up).sum() + (rows * up_rows).sum()).backward()

        x_ranks = hidden.clone().requires_grad_()
        rows_ranks = embedding(tokens)
        logits = vocabulary_logits(x_ranks, embedding.read("weight"), head.read("bias"))
        loss = vocabulary_loss(logits, targets, width or vocab_size)
        ((loss * up).sum() + (rows_ranks * up_rows).sum()).backward()
        assert loss.dtype == torch.float64
        found = {**whole_gradients(embedding), **whole_gradients(head)}
        assert weight.grad is not None
        assert bias.grad is not None
        padding = embedding.weight.grad[max(0, vocab_size - embedding.first_id) :]
        result = {
            "rows": difference(rows_ranks.detach(), rows.detach()),
            "loss": difference(loss.detach(), expected.detach()),
            "weight": difference(found[NAME], weight.grad),
            "bias": difference(found[BIAS], bias.grad),
            "padding": float(padding.abs().sum()),
        }
        if len(targets):
            assert x.grad is not None
            assert x_ranks.grad is not None
            result["hidden"] = difference(x_ranks.grad, x.grad)
        return result


def compare_all(world: World, sizes: list[int]) -> dict[str, dict[str, float]]:
    return {
        f"{size} ids, targets {placed}": compare_with_dense(world, world.size, size, placed)
        for size in sizes
        for placed in ("anywhere", "first rank", "last id", "none")
    }


@pytest.mark.parametrize(("tensor", "sizes"), [(1, [53]), (2, [53, 52]), (4, [53, 9, 5])])
def test_vocabulary_on_ranks_equals_a_dense_one(
    run_ranks: Run, tensor: int, sizes: list[int]
) -> None:
    for told in run_ranks(tensor)(compare_all, sizes):
        for name, found in told.items():
            assert max(found.values()) < TOLERANCE, (name, found)


def test_padded_ids_in_the_softmax_are_seen(run_ranks: Run) -> None:
    """The comparison above notices when padding is taken for tokens."""
    for told in run_ranks(2)(compare_with_dense, 2, 53, "anywhere", 54):
        assert told["loss"] > 1e-2
        assert told["hidden"] > 1e-2


def compare_with_token_loss(world: World, dtype: torch.dtype) -> tuple[float, float, int, int]:
    """Summed loss, gradient of the scores and right predictions beside the local network's."""
    with megatron_grid(world, ParallelConfig(tensor=world.size)):
        from mpotrain.engine.megatron.vocabulary import vocabulary_correct, vocabulary_loss

        generator = torch.Generator().manual_seed(7)
        targets = torch.randint(53, (4, 25), generator=generator)
        mask = torch.rand(4, 25, generator=generator) < 0.7
        batch = Batch(targets, targets, mask, torch.arange(4))
        # Few distinct scores: there are ties within ranks and between them.
        scores = (draw(4, 25, 53, seed=8) * 2).round() - 50.0
        best = scores.argmax(-1)
        scores.scatter_(-1, targets[..., None], scores.amax(-1, keepdim=True) * 1.0)
        assert 0 < (scores.argmax(-1) == targets).sum() < targets.numel()
        assert (best != scores.argmax(-1)).any()
        dense = scores.to(dtype).requires_grad_()
        local = token_loss(dense, batch, [], training=False, return_logits=False)
        local.loss_sum.backward()

        width = -(-53 // world.size)
        padded = functional.pad(scores.to(dtype), (0, width * world.size - 53))
        mine = padded[..., world.rank * width : (world.rank + 1) * width].flatten(0, 1)
        mine = mine.clone().requires_grad_()
        before = mine.detach().clone()
        losses = vocabulary_loss(mine, targets.flatten(), 53)
        loss = torch.where(mask.flatten(), losses, torch.zeros_like(losses)).sum()
        loss.backward()
        right = vocabulary_correct(mine, targets.flatten(), 53) & mask.flatten()
        assert torch.equal(mine.detach(), before)
        assert losses.dtype == torch.float32
        assert local.statistics is not None
        assert dense.grad is not None
        assert mine.grad is not None
        assert mine.grad.dtype == dtype
        grad = functional.pad(dense.grad, (0, width * world.size - 53)).flatten(0, 1)
        own = grad[:, world.rank * width : (world.rank + 1) * width]
        return (
            difference(loss.detach(), local.loss_sum.detach()),
            float((mine.grad - own).abs().max()),
            int(right.sum()),
            int(local.statistics["correct"]),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_loss_and_right_predictions_of_the_local_network(
    run_ranks: Run, tensor: int, dtype: torch.dtype
) -> None:
    for loss, grad, right, expected in run_ranks(tensor)(compare_with_token_loss, dtype):
        assert loss < 1e-6
        assert grad < (1e-6 if dtype == torch.float32 else 1e-2)
        assert right == expected


def edge_cases(world: World) -> dict[str, Any]:
    with megatron_grid(world, ParallelConfig(tensor=world.size)):
        from mpotrain.engine.megatron.vocabulary import vocabulary_correct, vocabulary_loss

        width = 3
        first = world.rank * width
        # 7 tokens on 4 ranks of 3 ids: rank 3 has none, and padding offers the highest scores.
        scores = torch.full((5, 12), 1e30)
        scores[:, :7] = torch.tensor(
            [
                [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
                [-5.0, -1.0, -5.0, -1.0, -5.0, -5.0, -1.0],
                [1e4, 0.0, 0.0, 0.0, 0.0, 0.0, 1e4],
                [-1e30, -1e30, -1e30, -1e30, -1e30, -1e30, -1e30],
                [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            ]
        )
        mine = scores[:, first : first + width].clone().requires_grad_()
        targets = torch.tensor([0, 1, 6, 0, -100])
        losses = vocabulary_loss(mine, targets, 7)
        losses[:4].sum().backward()
        shifted = torch.tensor([1, 3, 0, 0, 6])
        return {
            "losses": losses.detach()[:4].tolist(),
            "is_finite": bool(torch.isfinite(losses).all()),
            "right": vocabulary_correct(mine, targets, 7).tolist(),
            "later": vocabulary_correct(mine, shifted, 7).tolist(),
            "grad": None if mine.grad is None else float(mine.grad[4].abs().max()),
        }


def test_ties_large_scores_and_ranks_without_tokens(run_ranks: Run) -> None:
    log = torch.tensor([7.0, 3.0 + 4.0 * torch.exp(torch.tensor(-4.0)).item(), 2.0, 7.0]).log()
    for told in run_ranks(4)(edge_cases):
        assert told["losses"] == pytest.approx(log.tolist(), rel=1e-5)
        assert told["is_finite"]
        assert told["right"] == [True, True, False, True, False]
        assert told["later"] == [False, False, True, True, True]
        assert told["grad"] == 0.0


def wrong_size(world: World) -> str:
    with megatron_grid(world, ParallelConfig(tensor=world.size)):
        from mpotrain.engine.megatron.vocabulary import VocabularyEmbedding

        slots = make_slots({NAME: torch.zeros(53, HIDDEN)})
        config = make_config(ParallelConfig(tensor=world.size))
        try:
            VocabularyEmbedding(slots, NAME, 60, HIDDEN, config)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return ""


def test_sizes_that_contradict_the_network_are_refused(run_ranks: Run) -> None:
    for message in run_ranks(1)(wrong_size):
        assert NAME in message
