"""What a model counts in an evaluation, over ranks that hold different numbers of batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed import toy_model as toy
from distributed.engines import CPU_WORLD, SEED, local_engine, zero
from distributed.mixture_model import engine_of, model_config
from torch import nn

from mpotrain.batch import Batch, LossOutput
from mpotrain.engine import evaluation
from mpotrain.engine.base import EvalResult
from mpotrain.engine.config import DeepSpeedConfig, LocalConfig
from mpotrain.engine.deepspeed import DeepSpeedEngine
from mpotrain.engine.local import LocalEngine
from mpotrain.engine.statistics import StatisticsSum
from mpotrain.parallel.ranks import World

MODEL = model_config(dropout=0.0)
COUNTS = {0: 1, 1: 3, 2: 0}
"""Batches of each rank; the fourth rank has as many as the first."""


def batches(rank: int) -> list[Batch]:
    first = 900 + 100 * rank
    number = COUNTS.get(rank, 1)
    return [toy.batch_of(range(first + 4 * n, first + 4 * n + 2 + n)) for n in range(number)]


def evaluate(world: World, config: DeepSpeedConfig, expert_ranks: int) -> EvalResult:
    engine = engine_of(world, config, MODEL, expert_ranks=expert_ranks)
    held = engine.evaluate(iter(batches(world.rank)))
    engine.close()
    return held


def assert_equal(held: EvalResult, wanted: EvalResult) -> None:
    assert held.num_tokens == wanted.num_tokens > 0
    assert held.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-5)
    assert held.statistics.keys() == wanted.statistics.keys()
    for name, value in wanted.statistics.items():
        assert held.statistics[name].dtype == torch.float64
        torch.testing.assert_close(held.statistics[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("world", "config", "expert_ranks"),
    [
        pytest.param(1, zero(2), 1, id="one"),
        pytest.param(2, zero(0), 1, id="zero0"),
        pytest.param(4, zero(1), 1, id="zero1"),
        pytest.param(2, zero(3), 1, id="zero3"),
        pytest.param(2, zero(1, dtype="bf16"), 2, id="bf16-ep2"),
        pytest.param(4, zero(2), 2, id="ep2"),
    ],
)
def test_sums_are_those_of_all_batches(
    run_ranks: Any, world: int, config: DeepSpeedConfig, expert_ranks: int
) -> None:
    """Routers count tokens whatever the loss mask says: borrowed batches would show."""
    local = engine_of(CPU_WORLD, LocalConfig(device="cpu"), MODEL)
    wanted = local.evaluate([batch for rank in range(world) for batch in batches(rank)])
    tokens = float(wanted.statistics["expert_tokens"][0].sum())
    assert tokens == sum(b.inputs.numel() for rank in range(world) for b in batches(rank))
    for held in run_ranks(world)(evaluate, config, expert_ranks):
        if config.dtype == "fp32":
            assert_equal(held, wanted)
        else:
            assert float(held.statistics["expert_tokens"][0].sum()) == tokens


class Counting(toy.ToyModel):
    """Counts right predictions and mean squares, and a loss that is NaN where nothing counts."""

    def forward(self, batch: Batch) -> LossOutput:
        output = super().forward(batch)
        if self.training:
            return output
        values = batch.targets[batch.loss_mask].double()
        statistics = {
            "correct": (batch.inputs == batch.targets)[batch.loss_mask].sum(),
            "moments": torch.stack([values.sum(), values.square().sum()]),
        }
        undefined = 0.0 * output.loss_sum / batch.num_tokens if batch.num_tokens == 0 else 0.0
        return replace(output, loss_sum=output.loss_sum + undefined, statistics=statistics)


def counting_engine(world: World, stage: int | None) -> Any:
    torch.manual_seed(0)
    model: nn.Module = Counting()
    optimizer: Any = toy.build_optimizer(model)
    if stage is None:
        return LocalEngine(
            model, optimizer, config=LocalConfig(device="cpu"), world=world, seed=SEED,
            clip_norm=None,
        )  # fmt: skip
    return DeepSpeedEngine(
        model, optimizer, config=zero(stage), world=world, seed=SEED, clip_norm=None,
        micro_batch_size=2, accumulation=4, global_batch_size=8 * world.size,
    )  # fmt: skip


def count(world: World, stage: int) -> EvalResult:
    engine = counting_engine(world, stage)
    held: EvalResult = engine.evaluate(iter(batches(world.rank)))
    engine.close()
    return held


@pytest.mark.parametrize("stage", [1, 3])
def test_statistics_of_evaluation_alone(run_ranks: Any, stage: int) -> None:
    wanted = counting_engine(CPU_WORLD, None).evaluate([*batches(0), *batches(1)])
    assert wanted.statistics["moments"].shape == (2,)
    assert float(wanted.statistics["moments"][0]) > 0
    for held in run_ranks(2)(count, stage):
        assert_equal(held, wanted)


def test_models_that_count_nothing_and_evaluations_of_nothing() -> None:
    assert local_engine().evaluate(batches(0)).statistics == {}
    assert counting_engine(CPU_WORLD, None).evaluate([]) == EvalResult(0.0, 0)


def count_borrowed(world: World) -> EvalResult:
    original = evaluation.in_lockstep
    evaluation.in_lockstep = lambda *args: ((b, True) for b, _ in original(*args))  # type: ignore[assignment]
    try:
        return evaluate(world, zero(3), 1)
    finally:
        evaluation.in_lockstep = original


def test_borrowed_batches_would_be_seen(run_ranks: Any) -> None:
    wanted = run_ranks(2)(evaluate, zero(3), 1)[0].statistics["expert_tokens"]
    assert float(run_ranks(2)(count_borrowed)[0].statistics["expert_tokens"].sum()) > float(
        wanted.sum()
    )


def test_sums_stay_where_the_model_keeps_its_own() -> None:
    own = torch.ones(2, dtype=torch.float64)
    sums = StatisticsSum(torch.device("cpu"))
    for _ in range(2):
        sums.add({"moments": own})
    assert sums.over_uneven_ranks(CPU_WORLD)["moments"].tolist() == [2.0, 2.0]
    assert own.tolist() == [1.0, 1.0]
