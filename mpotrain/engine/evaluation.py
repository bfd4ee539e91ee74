"""Loss over held-out batches, summed over ranks that may hold different numbers of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from mpotrain.batch import Batch
from mpotrain.engine.base import EvalResult
from mpotrain.parallel.ranks import World


def evaluate_batches(
    model: nn.Module,
    forward: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    world: World,
    *,
    lockstep: bool,
) -> EvalResult:
    """Sum the losses of all ranks' batches.

    Args:
        model: switched to evaluation for the time and back.
        forward: returns the summed loss of a batch.
        batches: this rank's part.
        world: the ranks.
        lockstep: forward passes are collective (split weights), so a rank that has run out goes
            on with batches that do not count until all are done.

    Returns:
        The same sums on every rank.
    """
    was_training = model.training
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    model.eval()
    try:
        with torch.no_grad():
            for batch in _in_lockstep(batches, world) if lockstep else batches:
                here = batch.to(world.device)
                sums[0] += forward(here).double()
                sums[1] += here.loss_mask.sum()
    finally:
        model.train(was_training)
    loss_sum, num_tokens = world.all_reduce_sum(sums).tolist()
    return EvalResult(loss_sum=loss_sum, num_tokens=int(num_tokens))


def _in_lockstep(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """Yield this rank's batches, then batches without targets until no rank has any left."""
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
            batch = replace(spare, loss_mask=torch.zeros_like(spare.loss_mask))
        yield batch
