"""DeepSpeed in every stage and world against the local engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distributed import toy_model as toy
from distributed.engines import (
    CLIP,
    OFFLOADED,
    assert_same_steps,
    deepspeed_engine,
    largest_difference,
    local_engine,
    run_steps,
    same_bits,
    whole_state,
    zero,
)

from mpotrain.engine.base import StepResult
from mpotrain.engine.config import DeepSpeedConfig
from mpotrain.parallel.ranks import World


def train(world: World, config: DeepSpeedConfig, dropout: float, num_steps: int) -> Any:
    engine = deepspeed_engine(world, config, dropout=dropout)
    results = run_steps(engine, 0, num_steps)
    held = engine.evaluate([toy.batch_of(range(900 + 3 * world.rank, 903 + 3 * world.rank))])
    state = whole_state(engine)
    engine.close()
    return results, state, held, engine.num_updates


@pytest.mark.parametrize(
    ("world", "stage"),
    [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1), (4, 3)],
)
def test_fp32_stages_equal_local(run_ranks: Any, world: int, stage: int) -> None:
    local = local_engine()
    wanted = run_steps(local, 0, 4)
    assert any(result.grad_norm > CLIP for result in wanted)
    outcomes = run_ranks(world)(train, zero(stage), 0.0, 4)
    for results, state, _, num_updates in outcomes:
        assert_same_steps(results, wanted, 1e-6)
        assert largest_difference(state, whole_state(local)) < 2e-5
        assert num_updates == 4
    assert all(same_bits(state, outcomes[0][1]) for _, state, _, _ in outcomes)
    held = local.evaluate([toy.batch_of(range(900, 900 + 3 * world))])
    assert outcomes[0][2].num_tokens == held.num_tokens
    assert outcomes[0][2].loss_sum == pytest.approx(held.loss_sum, rel=1e-5)


def norms_of_both(world: World, config: DeepSpeedConfig) -> list[tuple[float, float]]:
    engine = deepspeed_engine(world, config)
    pairs = []
    for step in range(2):
        (result,) = run_steps(engine, step, step + 1)
        pairs.append((result.grad_norm, float(engine._engine.get_global_grad_norm())))
    engine.close()
    return pairs


@pytest.mark.parametrize("config", [zero(1), zero(2), zero(3), zero(3, offload_optimizer=True)])
def test_our_norm_is_deepspeeds(run_ranks: Any, config: DeepSpeedConfig) -> None:
    for ours, theirs in run_ranks(2)(norms_of_both, config)[0]:
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_local_bf16(run_ranks: Any, stage: int) -> None:
    local = local_engine(dtype="bf16")
    wanted = run_steps(local, 0, 4)
    config = zero(stage, dtype="bf16")
    for results, state, _, _ in run_ranks(2)(train, config, 0.0, 4):
        assert_same_steps(results, wanted, 1e-2)
        reference = whole_state(local)
        for name, tensors in state.items():
            torch.testing.assert_close(
                tensors["weight"], reference[name]["weight"], rtol=2e-2, atol=4e-2
            )


@pytest.mark.parametrize("config", [OFFLOADED[0], OFFLOADED[2]])
def test_offload_equals_local(run_ranks: Any, config: DeepSpeedConfig) -> None:
    local = local_engine()
    wanted = run_steps(local, 0, 3)
    for results, state, _, _ in run_ranks(2)(train, config, 0.0, 3):
        assert_same_steps(results, wanted, 1e-6)
        assert largest_difference(state, whole_state(local)) < 2e-5


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 2), (4, 3)])
def test_dropout_does_not_depend_on_the_world(run_ranks: Any, world: int, stage: int) -> None:
    local = local_engine(dropout=0.3)
    torch.manual_seed(12345)
    wanted = run_steps(local, 0, 3)
    assert wanted[0].loss != pytest.approx(run_steps(local_engine(), 0, 1)[0].loss, rel=1e-3)
    results = run_ranks(world)(train, zero(stage), 0.3, 3)[0][0]
    assert_same_steps(results, wanted, 1e-6)


def uneven_evaluation(world: World, stage: int) -> Any:
    engine = deepspeed_engine(world, zero(stage), dropout=0.5)
    mine = [toy.batch_of(range(4 * n, 4 * n + 2 + n)) for n in range(3)] if world.rank == 1 else []
    held = engine.evaluate(iter(mine))
    training = engine.model.training
    run_steps(engine, 0, 1)
    engine.close()
    return held, training


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_may_evaluate_different_numbers_of_batches(run_ranks: Any, stage: int) -> None:
    batches = [toy.batch_of(range(4 * n, 4 * n + 2 + n)) for n in range(3)]
    wanted = local_engine().evaluate(batches)
    for held, training in run_ranks(2)(uneven_evaluation, stage):
        assert held.num_tokens == wanted.num_tokens > 0
        assert held.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-5)
        assert held.perplexity == pytest.approx(math.exp(wanted.mean), rel=1e-5)
        assert training


def look_inside(world: World, stage: int) -> Any:
    engine = deepspeed_engine(world, zero(stage, persistence_threshold=0))
    run_steps(engine, 0, 1)
    state = whole_state(engine)
    loss = None
    with engine.full_parameters():
        whole = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        if world.rank == 1:
            # Twice: the first pass must not give the weights back. Alone: no peer may be needed.
            for _ in range(2):
                engine.model.eval()
                with torch.no_grad():
                    loss = float(engine.model(toy.batch_of(range(50, 54))).loss_sum)
    same = all(torch.equal(whole[name], state[name]["weight"]) for name in state)
    split = sum(p.numel() for p in engine.model.parameters()) < sum(
        w.numel() for w in whole.values()
    )
    results = run_steps(engine, 1, 3)
    engine.close()
    return same, split, loss, results


@pytest.mark.parametrize("stage", [2, 3])
def test_full_parameters_open_the_model(run_ranks: Any, stage: int) -> None:
    local = local_engine()
    run_steps(local, 0, 1)
    wanted = local.evaluate([toy.batch_of(range(50, 54))]).loss_sum
    outcomes = run_ranks(2)(look_inside, stage)
    assert [split for _, split, _, _ in outcomes] == [stage == 3] * 2
    assert outcomes[1][2] == pytest.approx(wanted, rel=1e-5)
    further = run_steps(local, 1, 3)
    for same, _, _, results in outcomes:
        assert same
        assert_same_steps(results, further, 1e-6)


def without_clipping(world: World, stage: int) -> list[StepResult]:
    engine = deepspeed_engine(world, zero(stage), clip=None)
    results = run_steps(engine, 0, 3)
    engine.close()
    return results


@pytest.mark.parametrize("stage", [0, 3])
def test_clipping_can_be_off(run_ranks: Any, stage: int) -> None:
    wanted = run_steps(local_engine(clip=None), 0, 3)
    assert_same_steps(run_ranks(2)(without_clipping, stage)[0], wanted, 1e-6)
    clipped = run_steps(local_engine(), 0, 3)
    assert wanted[2].loss != pytest.approx(clipped[2].loss, rel=1e-6)


def start_with_compiler_forbidden(world: World) -> float:
    from torch.utils import cpp_extension

    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("an extension was compiled")

    original, cpp_extension.load = cpp_extension.load, refuse
    try:
        engine = deepspeed_engine(world, zero(2, offload_optimizer=True))
        (result,) = run_steps(engine, 0, 1)
        engine.close()
    finally:
        cpp_extension.load = original
    return result.loss


def test_nothing_is_compiled_on_a_cpu(run_ranks: Any) -> None:
    assert run_ranks(2)(start_with_compiler_forbidden)[0] > 0
