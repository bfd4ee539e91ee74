"""Evaluation through the pipeline: held-out batches, several of them on their way at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from mpotrain.batch import Batch
from mpotrain.engine.base import EvalResult
from mpotrain.engine.evaluation import in_lockstep
from mpotrain.engine.megatron.pipeline import Pipeline, batches_at_a_time
from mpotrain.engine.megatron.telling import Collector, Telling
from mpotrain.parallel.ranks import World

Counted = tuple[Batch, bool]


def evaluate_batches(
    chunks: Sequence[Any],
    pipeline: Pipeline,
    collector: Collector,
    batches: Iterable[Batch],
    data_world: World,
) -> EvalResult:
    """Sum the losses and the statistics of all ranks' batches (collective).

    Args:
        chunks: of this rank; switched to evaluation for the time and back.
        pipeline: runs them.
        collector: puts together what all ranks tell.
        batches: this rank's part; data-parallel ranks may have different numbers of them.
        data_world: the data-parallel ranks.
    """
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    total, num_tokens = Telling(), 0
    try:
        with torch.no_grad():
            size = batches_at_a_time(len(chunks))
            for group in _groups(in_lockstep(batches, data_world), size, data_world):
                inputs, counts = [batch for batch, _ in group], [count for _, count in group]
                total.merge(pipeline.evaluate(inputs, counts))
                num_tokens += sum(batch.num_tokens for batch, count in group if count)
    finally:
        for chunk in chunks:
            chunk.train(was_training)
    loss_sum, statistics = collector.collect(total, "evaluate")
    counted = torch.tensor(num_tokens, dtype=torch.int64, device=data_world.device)
    return EvalResult(loss_sum, int(data_world.all_reduce_sum(counted)), statistics)


def _groups(batches: Iterator[Counted], size: int, data_world: World) -> Iterator[list[Counted]]:
    """Yield groups of `size` batches of one shape; the last is filled up with uncounted ones.

    All data-parallel ranks yield groups at the same batches (collective): experts of one rank work
    for others.
    """
    group: list[Counted] = []
    for batch, counts in batches:
        differs = bool(group) and group[0][0].inputs.shape != batch.inputs.shape
        if size > 1 and data_world.agree(int(differs)):
            yield _filled(group, size)
            group = []
        group.append((batch, counts))
        if len(group) == size:
            yield group
            group = []
    if group:
        yield _filled(group, size)


def _filled(group: list[Counted], size: int) -> list[Counted]:
    return group + [(group[-1][0], False)] * (size - len(group))
