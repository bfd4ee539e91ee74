"""Central tensors that rest: bit for bit, in every engine and stage, on every rank alike."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from distributed.engines import CPU_WORLD, State, largest_difference, same_bits, whole_state, zero
from distributed.mixture_model import engine_of, model_config, run_steps

from mpotrain.engine.central_mask import CentralMask
from mpotrain.engine.config import CentralMaskConfig, DeepSpeedConfig, LocalConfig
from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.nn.config import DenseSite, MPOSite
from mpotrain.parallel.ranks import World

LOCAL = LocalConfig(device="cpu")
STEPS = 6
MIXTURES = model_config()
TENSORIZED = model_config(
    moe=None,
    sites=GPT2Sites(
        qkv=DenseSite(bias=False),
        c_fc=MPOSite(in_modes=(2, 4, 2), out_modes=(4, 4, 2)),
        c_proj=MPOSite(in_modes=(4, 4, 2), out_modes=(2, 4, 2)),
    ),
)
GRANULARITIES = ("step", "tensor", "element")


def train(
    world: World,
    config: DeepSpeedConfig | LocalConfig,
    model: GPT2Config,
    mask: CentralMaskConfig,
    expert_ranks: int,
) -> tuple[list[State], dict[str, int]]:
    """Return the whole state before the first step and after every step, and the counters."""
    engine = engine_of(world, config, model, expert_ranks=expert_ranks, mask=mask)
    states = [whole_state(engine)]
    for step in range(STEPS):
        run_steps(engine, step, step + 1)
        states.append(whole_state(engine))
    counters = engine.counters()
    engine.close()
    return states, counters


def central_names(model: GPT2Config) -> list[str]:
    return [info.name for info in model.parameters() if info.role == "central"]


def only(state: State, names: list[str]) -> State:
    return {name: state[name] for name in names}


def check(states: list[State], model: GPT2Config, mask: CentralMaskConfig) -> int:
    """Hold every step against the draws; return how often a tensor has rested."""
    names = central_names(model)
    draws = CentralMask(mask, 11, [{"central": names, "params": [torch.zeros(1)] * len(names)}])
    others = [name for name in states[0] if name not in names and "exp_avg" in states[1][name]]
    rested = 0
    for step, (before, after) in enumerate(pairwise(states)):
        assert not any(same_bits(only(before, [n]), only(after, [n])) for n in others)
        for name in names:
            if step == 0:
                # Without moments before: a resting tensor has none, which is stored as zeros.
                still = torch.equal(before[name]["weight"], after[name]["weight"])
                still &= not after[name]["exp_avg"].any()
            else:
                still = same_bits(only(before, [name]), only(after, [name]))
            assert still == draws.rests(name, step), (step, name)
            rested += still
    return rested


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("config", "expert_ranks"),
    [(zero(1), 1), (zero(1), 2), (zero(2), 2), (zero(1, dtype="bf16"), 2)],
    ids=["zero1", "zero1-ep2", "zero2-ep2", "bf16-ep2"],
)
def test_mixtures(
    run_ranks: Any, config: DeepSpeedConfig, expert_ranks: int, granularity: Any
) -> None:
    mask = CentralMaskConfig(probability=0.5, granularity=granularity)
    outcomes = run_ranks(2)(train, config, MIXTURES, mask, expert_ranks)
    wanted, counters = train(CPU_WORLD, LOCAL, MIXTURES, mask, 1)
    for states, counted in outcomes:
        assert counted == counters
        assert all(map(same_bits, states, outcomes[0][0]))
        if granularity != "element":
            rested = check(states, MIXTURES, mask)
            assert 0 < rested < STEPS * len(central_names(MIXTURES))
        if config.dtype == "fp32":
            assert largest_difference(states[-1], wanted[-1]) < 1e-5


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tensorized_model_in_every_stage(run_ranks: Any, stage: int, granularity: Any) -> None:
    mask = CentralMaskConfig(probability=0.5, granularity=granularity)
    wanted, _ = train(CPU_WORLD, LOCAL, TENSORIZED, mask, 1)
    if granularity != "element":
        assert check(wanted, TENSORIZED, mask) > 0
    for states, _ in run_ranks(2)(train, zero(stage), TENSORIZED, mask, 1):
        assert largest_difference(states[-1], wanted[-1]) < 1e-5
        if granularity != "element":
            check(states, TENSORIZED, mask)


@pytest.mark.parametrize("granularity", ["tensor", "element"])
@pytest.mark.parametrize(
    ("config", "model", "expert_ranks"),
    [
        pytest.param(zero(1, offload_optimizer=True), MIXTURES, 2, id="zero1-ep2"),
        pytest.param(zero(2, offload_optimizer=True), MIXTURES, 2, id="zero2-ep2"),
        pytest.param(
            zero(3, offload_optimizer=True, offload_parameters=True), TENSORIZED, 1, id="zero3"
        ),
    ],
)
def test_masters_in_host_memory(
    run_ranks: Any,
    config: DeepSpeedConfig,
    model: GPT2Config,
    expert_ranks: int,
    granularity: Any,
) -> None:
    mask = CentralMaskConfig(probability=0.5, granularity=granularity)
    wanted, counters = train(CPU_WORLD, LOCAL, model, mask, 1)
    outcomes = run_ranks(2)(train, config, model, mask, expert_ranks)
    for states, counted in outcomes:
        assert counted == counters
        assert all(map(same_bits, states, outcomes[0][0]))
        for state, reference in zip(states, wanted, strict=True):
            assert largest_difference(state, reference) < 1e-5
        if granularity == "tensor":
            assert 0 < check(states, model, mask) < STEPS * len(central_names(model))


def test_elements_move_and_rest_side_by_side() -> None:
    mask = CentralMaskConfig(probability=0.5, granularity="element")
    states, _ = train(CPU_WORLD, LOCAL, MIXTURES, mask, 1)
    for name in central_names(MIXTURES):
        for before, after in pairwise(states[1:]):
            moved = before[name]["weight"] != after[name]["weight"]
            assert 0.2 < float(moved.float().mean()) < 0.8
            assert torch.equal(moved, before[name]["exp_avg"] != after[name]["exp_avg"])


def test_certain_mask_freezes_and_no_mask_changes_nothing() -> None:
    frozen, _ = train(CPU_WORLD, LOCAL, MIXTURES, CentralMaskConfig(probability=1.0), 1)
    for name in central_names(MIXTURES):
        assert torch.equal(frozen[0][name]["weight"], frozen[-1][name]["weight"])
    names = [info.name for info in MIXTURES.parameters() if info.role == "auxiliary"]
    assert not any(torch.equal(frozen[0][n]["weight"], frozen[-1][n]["weight"]) for n in names)
    never = CentralMaskConfig(probability=1e-12, granularity="tensor")
    plain, _ = train(CPU_WORLD, LOCAL, MIXTURES, CentralMaskConfig(), 1)
    masked, _ = train(CPU_WORLD, LOCAL, MIXTURES, never, 1)
    assert same_bits(plain[-1], masked[-1])


def save_and_go_on(
    world: World, config: DeepSpeedConfig | LocalConfig, granularity: Any, expert_ranks: int
) -> tuple[bool, float]:
    """Move the state into a fresh engine halfway; compare with going straight on."""
    mask = CentralMaskConfig(probability=0.5, granularity=granularity)
    first = engine_of(world, config, MIXTURES, expert_ranks=expert_ranks, mask=mask)
    run_steps(first, 0, 3)
    saved, counters = whole_state(first), first.counters()
    run_steps(first, 3, STEPS)
    straight = whole_state(first)
    first.close()
    second = engine_of(world, config, MIXTURES, expert_ranks=expert_ranks, mask=mask)
    second.import_state(lambda name: saved[name], 3, counters)
    run_steps(second, 3, STEPS)
    resumed = whole_state(second)
    assert second.counters() != counters or granularity == "element"
    second.close()
    return same_bits(straight, resumed), largest_difference(straight, resumed)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_counters_survive_a_change_of_engine(run_ranks: Any, granularity: Any) -> None:
    assert save_and_go_on(CPU_WORLD, LOCAL, granularity, 1) == (True, 0.0)
    for outcome in run_ranks(2)(save_and_go_on, zero(2), granularity, 2):
        assert outcome == (True, 0.0)
