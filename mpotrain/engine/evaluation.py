"""Loss over held-out batches, summed over ranks that may hold different numbers of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mpotrain.batch import Batch
from mpotrain.engine.base import EvalResult
from mpotrain.engine.statistics import StatisticsSum
from mpotrain.parallel.ranks import World

Forward = Callable[[Batch], tuple[Tensor, Mapping[str, Tensor] | None]]
"""Returns the summed loss of a batch and the model's statistics of it."""


def evaluate_batches(
    model: nn.Module,
    forward: Forward,
    batches: Iterable[Batch],
    world: World,
    *,
    lockstep: bool,
) -> EvalResult:
    """Sum the losses and the statistics of all ranks' batches.

    Args:
        model: switched to evaluation for the time and back.
        forward: computes a batch.
        batches: this rank's part.
        world: the ranks.
        lockstep: forward passes are collective (split weights), so a rank that has run out goes
            on with batches that do not count until all are done.

    Returns:
        The same sums on every rank.
    """
    was_training = model.training
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    statistics = StatisticsSum(world.device)
    model.eval()
    try:
        with torch.no_grad():
            for batch, counts in in_lockstep(batches, world) if lockstep else _alone(batches):
                here = batch.to(world.device)
                loss, counted = forward(here)
                if counts:
                    sums[0] += loss.double()
                    sums[1] += here.loss_mask.sum()
                    statistics.add(counted)
    finally:
        model.train(was_training)
    loss_sum, num_tokens = world.all_reduce_sum(sums).tolist()
    return EvalResult(loss_sum, int(num_tokens), statistics.over_uneven_ranks(world))


def _alone(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Yield this rank's batches; all of them count."""
    for batch in batches:
        yield batch, True


def in_lockstep(batches: Iterable[Batch], world: World) -> Iterator[tuple[Batch, bool]]:
    """Yield this rank's batches, then others' that do not count until no rank has any left.

    A batch that does not count has no targets either, so that a model that looks at the mask does
    no work for it; what it counts all the same (tokens of experts) is not added up.
    """
    iterator = iter(batches)
    spare: Batch | None = None
    while True:
        batch = next(iterator, None)
        if not world.agree(int(batch is not None)):
            return
        if spare is None and world.agree(int(batch is None)):
            # A rank without any batch borrows one: only its shape matters.
            offered = world.gather_objects(batch)
            spare = next(other for other in offered if other is not None)
        elif batch is not None:
            spare = batch
        if batch is None:
            assert spare is not None
            yield replace(spare, loss_mask=torch.zeros_like(spare.loss_mask)), False
        else:
            yield batch, True
