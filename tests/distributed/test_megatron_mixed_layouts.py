"""Several kinds of parallelism at once, on micro-batches that are anything but alike.

Some micro-batches have no target at all, rows hold two documents, and stages are without experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from distributed.megatron_cases import (
    EXPERTS,
    GLOBAL,
    GPT_MOE,
    LENGTH,
    LR,
    MICRO,
    NETWORKS,
    OVERLAP,
    PLAIN,
    SP,
    SPLIT,
    Layout,
    local_engine,
    megatron_engine,
    one_batch,
)

from mpotrain.batch import Batch
from mpotrain.engine.base import Engine
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.t5_config import T5Config
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

Told = list[tuple[float, ...]]
SPARSE = replace(GPT_MOE, moe=replace(EXPERTS, every=4))
"""One mixture in the last of four layers: most stages have no expert and no optimizer for any."""
CASES: list[tuple[str, str, Layout]] = [
    ("gpt-moe", "cp2+ep4+dp2", Layout(ParallelConfig(context=2, expert=4, data=2), PLAIN)),
    ("gpt-moe", "cp2+ep2+dp2", Layout(ParallelConfig(context=2, expert=2, data=2), OVERLAP)),
    ("gpt-moe", "ep2+dp4", Layout(ParallelConfig(expert=2, data=4), OVERLAP)),
    ("gpt-moe", "tp2+cp2+ep2+etp2", Layout(replace(SP, context=2, expert=2, expert_tensor=2))),
    ("gpt-moe", "ep2+pp2+vp2", Layout(ParallelConfig(expert=2, pipeline=2, virtual_pipeline=2))),
    ("gpt-moe", "tp2+pp2+etp2", Layout(replace(SP, pipeline=2, expert_tensor=2), SPLIT)),
    ("sparse", "pp4", Layout(ParallelConfig(pipeline=4), OVERLAP)),
    ("sparse", "tp2+pp2+ep2", Layout(replace(SP, pipeline=2, expert=2), SPLIT)),
    ("mpobert", "dp2+pp2+vp2", Layout(ParallelConfig(data=2, pipeline=2, virtual_pipeline=2))),
    ("mpobert", "pp2+cp2", Layout(ParallelConfig(pipeline=2, context=2), OVERLAP)),
    ("mpobert", "tp2+dp2", Layout(ParallelConfig(tensor=2, data=2), OVERLAP)),
    ("gpt-ttm", "dp2+cp2", Layout(ParallelConfig(data=2, context=2), OVERLAP)),
    ("gpt-ttm", "dp4", Layout(ParallelConfig(data=4), OVERLAP)),
    ("t5-moe", "tp2+ep2+dp2", Layout(replace(SP, expert=2, data=2), OVERLAP)),
    ("t5-moe", "ep4", Layout(ParallelConfig(expert=4), OVERLAP)),
]


def network(name: str) -> AnyModel:
    return SPARSE if name == "sparse" else NETWORKS[name]


def uneven(model: AnyModel, step: int, number: int) -> Batch:
    """A micro-batch of two documents in a row; one of four has no target, another few."""
    batch = one_batch(model, step, number)
    counts = batch.loss_mask.clone()
    counts[:, 0 if number % 4 == 1 else 3 if number % 4 == 2 else LENGTH :] = False
    batch = replace(batch, loss_mask=counts)
    if isinstance(model, EncoderConfig):
        return batch  # its rows hold two documents already
    draw = torch.Generator().manual_seed(7 * number + step)
    ends = torch.randint(2, LENGTH - 2, (len(batch.inputs), 1), generator=draw)
    places = torch.arange(LENGTH)
    documents = (places >= ends).long() + 1
    if isinstance(model, T5Config):
        assert batch.encoder_inputs is not None
        source = torch.arange(batch.encoder_inputs.shape[1])
        return replace(
            batch, document_ids=documents, encoder_document_ids=(source > ends).long() + 1
        )
    positions = torch.where(places >= ends, places - ends, places)
    return replace(batch, document_ids=documents, positions=positions)


def told(engine: Engine, model: AnyModel) -> Told:
    """Losses, norms and statistics of three steps, with an evaluation in between."""
    rank, size = engine.world.data_rank, engine.world.data_size
    found: Told = []
    for step in range(3):
        batches = [uneven(model, step, n) for n in range(rank, GLOBAL // MICRO, size)]
        result = engine.step(batches, lr=LR * (1 + step) / 4, step=step, detail=True)
        assert not result.skipped, result.reason
        roles, statistics = result.grad_norm_by_role or {}, result.statistics
        found.append((result.loss, result.grad_norm, *(roles[role] for role in sorted(roles))))
        found.append(tuple(float(statistics[name].sum()) for name in sorted(statistics)))
        if step == 1:
            held_out = engine.evaluate(uneven(model, 50, n) for n in range(rank, 5, size))
            found.append((held_out.loss_sum, held_out.num_tokens))
    return found


@cache
def expected(name: str) -> Told:
    return told(local_engine(network(name)), network(name))


def on_ranks(world: World, name: str, layout: Layout) -> Told:
    engine = megatron_engine(world, network(name), layout)
    try:
        return told(engine, network(name))
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("name", "degrees", "layout"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_uneven_batches_equal_the_local_engine(
    run_ranks: Callable[[int], Callable[..., list[Any]]], name: str, degrees: str, layout: Layout
) -> None:
    for found in run_ranks(layout.ranks)(on_ranks, name, layout):
        for ours, theirs in zip(found, expected(name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
