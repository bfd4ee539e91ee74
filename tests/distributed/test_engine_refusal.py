"""Updates that are refused, and configurations that are."""

from __future__ import annotations

import math
from typing import Any

import pytest
from distributed import toy_model as toy
from distributed.engines import (
    EVERY_KIND,
    deepspeed_engine,
    run_steps,
    same_bits,
    whole_state,
    zero,
)

from mpotrain.engine.config import DeepSpeedConfig
from mpotrain.parallel.ranks import World


def skip_then_go_on(world: World, config: DeepSpeedConfig) -> Any:
    straight = deepspeed_engine(world, config)
    run_steps(straight, 0, 2)
    wanted = run_steps(straight, 3, 5)
    final = whole_state(straight)
    straight.close()
    engine = deepspeed_engine(world, config)
    run_steps(engine, 0, 2)
    before = whole_state(engine)
    seen: list[tuple[float, float]] = []

    def guard(loss: float, norm: float) -> str:
        seen.append((loss, norm))
        return "told to"

    (skipped,) = run_steps(engine, 2, 3, guard=guard)
    untouched = same_bits(before, whole_state(engine)) and engine.num_updates == 2
    got = run_steps(engine, 3, 5, guard=lambda loss, norm: None)
    same_end = same_bits(final, whole_state(engine))
    engine.close()
    return skipped, seen, untouched, got == wanted, same_end


@pytest.mark.parametrize("config", EVERY_KIND)
def test_refused_update_leaves_no_trace(run_ranks: Any, config: DeepSpeedConfig) -> None:
    for skipped, seen, untouched, same_results, same_end in run_ranks(2)(skip_then_go_on, config):
        assert (skipped.skipped, skipped.reason) == (True, "told to")
        assert seen == [(skipped.loss, skipped.grad_norm)]
        assert (untouched, same_results, same_end) == (True, True, True)


def skip_before_first_update(world: World, config: DeepSpeedConfig) -> Any:
    engine = deepspeed_engine(world, config)
    before = whole_state(engine)
    run_steps(engine, 0, 1, guard=lambda loss, norm: "not yet")
    untouched = same_bits(before, whole_state(engine))
    got = run_steps(engine, 1, 3)
    end = whole_state(engine)
    engine.close()
    fresh = deepspeed_engine(world, config)
    wanted = run_steps(fresh, 1, 3)
    same_end = same_bits(end, whole_state(fresh))
    fresh.close()
    return untouched, got == wanted, same_end


@pytest.mark.parametrize("config", [zero(0), zero(1, dtype="bf16"), zero(2), zero(3)])
def test_first_update_may_be_refused(run_ranks: Any, config: DeepSpeedConfig) -> None:
    assert run_ranks(2)(skip_before_first_update, config) == [(True, True, True)] * 2


def poisoned_step(world: World, config: DeepSpeedConfig) -> Any:
    engine = deepspeed_engine(world, config)
    run_steps(engine, 0, 1)
    before = whole_state(engine)
    # Sample 16 + 3 lies in micro-batch 1 of step 1: rank 1 alone computes it.
    engine.model.poisoned_sample = 19
    (result,) = run_steps(engine, 1, 2)
    untouched = same_bits(before, whole_state(engine)) and engine.num_updates == 1
    (after,) = run_steps(engine, 2, 3)
    engine.close()
    return result, untouched, after


@pytest.mark.parametrize("config", EVERY_KIND)
def test_nan_on_one_rank_stops_all(run_ranks: Any, config: DeepSpeedConfig) -> None:
    for result, untouched, after in run_ranks(2)(poisoned_step, config):
        assert result.skipped
        assert math.isfinite(result.loss)
        assert result.reason == f"gradient norm is {result.grad_norm}"
        assert not math.isfinite(result.grad_norm)
        assert untouched
        assert not after.skipped
        assert math.isfinite(after.grad_norm)


def refused(world: World, settings: dict[str, Any]) -> str:
    try:
        deepspeed_engine(world, zero(**settings))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_bf16_stage_0_is_refused_with_its_reason(run_ranks: Any) -> None:
    (text,) = run_ranks(1)(refused, {"stage": 0, "dtype": "bf16"})
    assert text.startswith("ConfigError: engine.zero_stage: 0 with 16-bit weights is refused")
    assert "zero gradients" in text


def wrong_count(world: World) -> str:
    engine = deepspeed_engine(world, zero(1))
    try:
        engine.step(toy.microbatches(0, rank=0, world=1)[:3], lr=0.1, step=0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.close()
    return "accepted"


def test_wrong_number_of_microbatches_is_refused(run_ranks: Any) -> None:
    (text,) = run_ranks(1)(wrong_count)
    assert text == (
        "ParallelError: rank 0: 3 micro-batches in step 0, but the engine was built for 8"
    )
