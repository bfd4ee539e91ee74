"""Training state out of every engine and layout into every other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import toy_model as toy
from distributed.engines import (
    EVERY_KIND,
    State,
    assert_same_steps,
    deepspeed_engine,
    largest_difference,
    local_engine,
    run_steps,
    same_bits,
    whole_state,
    zero,
)

from mpotrain.engine.base import Engine, StepResult
from mpotrain.engine.config import DeepSpeedConfig
from mpotrain.parallel.ranks import World


def first_state(world: World, config: DeepSpeedConfig) -> State:
    engine = deepspeed_engine(world, config)
    state = whole_state(engine)
    engine.close()
    return state


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_masters_start_unrounded(run_ranks: Any, stage: int) -> None:
    state = run_ranks(2)(first_state, zero(stage, dtype="bf16"))[0]
    assert same_bits(state, whole_state(local_engine()))


LAYOUTS = [(None, 1), (0, 1), (1, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2), (3, 4)]


def engine_of(world: World, stage: int | None, seed: int) -> Engine:
    if stage is None:
        return local_engine(seed=seed)
    return deepspeed_engine(world, zero(stage), seed=seed)


def train_and_export(world: World, stage: int | None) -> tuple[State, list[StepResult], State]:
    engine = engine_of(world, stage, seed=0)
    run_steps(engine, 0, 3)
    middle = whole_state(engine)
    results = run_steps(engine, 3, 5)
    final = whole_state(engine)
    engine.close()
    return middle, results, final


def import_and_train(
    world: World, stage: int | None, middles: list[State]
) -> list[tuple[bool, list[StepResult], State]]:
    outcomes = []
    for middle in middles:
        engine = engine_of(world, stage, seed=99)
        engine.import_state(middle.__getitem__, 3)
        lossless = same_bits(whole_state(engine), middle)
        results = run_steps(engine, 3, 5)
        outcomes.append((lossless, results, whole_state(engine)))
        assert engine.num_updates == 5
        engine.close()
    return outcomes


def test_state_moves_between_all_layouts(run_ranks: Any) -> None:
    sources = [run_ranks(world)(train_and_export, stage)[0] for stage, world in LAYOUTS]
    middles = [middle for middle, _, _ in sources]
    for target, (stage, world) in enumerate(LAYOUTS):
        outcomes = run_ranks(world)(import_and_train, stage, middles)[0]
        for source, (lossless, results, final) in enumerate(outcomes):
            _, wanted, wanted_final = sources[source]
            assert lossless, (LAYOUTS[source], LAYOUTS[target])
            assert_same_steps(results, wanted, 2e-6)
            assert largest_difference(final, wanted_final) < 5e-5
            if source == target:
                assert results == wanted
                assert same_bits(final, wanted_final), LAYOUTS[target]


def resume(world: World, config: DeepSpeedConfig) -> tuple[bool, bool, bool]:
    engine = deepspeed_engine(world, config, dropout=0.2)
    run_steps(engine, 0, 2)
    middle = whole_state(engine)
    wanted, wanted_final = run_steps(engine, 2, 4), None
    wanted_final = whole_state(engine)
    engine.close()
    fresh = deepspeed_engine(world, config, dropout=0.2, seed=99)
    # What an engine did before an import must not shine through.
    run_steps(fresh, 7, 8)
    fresh.import_state(middle.__getitem__, 2)
    lossless = same_bits(whole_state(fresh), middle)
    same = run_steps(fresh, 2, 4) == wanted
    same_end = same_bits(whole_state(fresh), wanted_final)
    fresh.close()
    return lossless, same, same_end


@pytest.mark.parametrize("config", EVERY_KIND)
def test_same_layout_resumes_bitwise(run_ranks: Any, config: DeepSpeedConfig) -> None:
    assert run_ranks(2)(resume, config) == [(True, True, True)] * 2


def different_start(world: World, stage: int) -> tuple[State, int]:
    engine = deepspeed_engine(
        world, zero(stage, dtype="bf16" if stage else "fp32"), seed=world.rank
    )
    state = whole_state(engine)
    count = len(engine.json["zero_optimization"])
    engine.close()
    return state, count


@pytest.mark.parametrize("stage", [0, 2])
def test_all_ranks_start_from_rank_zero(run_ranks: Any, stage: int) -> None:
    state, _ = run_ranks(2)(different_start, stage)[1]
    assert same_bits(state, whole_state(local_engine(seed=0)))


def pass_through(world: World, config: DeepSpeedConfig, state: State) -> bool:
    engine = deepspeed_engine(world, config)
    engine.import_state(state.__getitem__, 5)
    same = same_bits(whole_state(engine), state)
    engine.close()
    return same


@pytest.mark.parametrize("config", [zero(0), zero(1, dtype="bf16"), zero(2), zero(3)])
def test_every_bit_survives(run_ranks: Any, config: DeepSpeedConfig) -> None:
    """Negative zeros and NaN payloads are lost where fragments are summed as numbers."""
    generator = torch.Generator().manual_seed(1)
    state = {
        name: {
            kind: torch.randint(-(2**31), 2**31, tuple(p.shape), generator=generator)
            .int()
            .view(torch.float32)
            for kind in ("weight", "exp_avg", "exp_avg_sq")
        }
        for name, p in toy.build().named_parameters()
    }
    state["central"]["weight"][0] = -0.0
    assert run_ranks(2)(pass_through, config, state) == [True, True]
