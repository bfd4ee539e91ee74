"""LAMB in every engine: norms of whole layers, wherever ZeRO has cut them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from distributed import toy_model as toy
from distributed.engines import (
    CPU_WORLD,
    State,
    largest_difference,
    same_bits,
    whole_state,
    zero,
)
from distributed.lamb_cases import (
    BOUNDED,
    CLIP,
    EVERYTHING,
    LAMB,
    LOCAL,
    STEPS,
    advance,
    assert_equal_to_local,
    engine_of,
    rate,
    train,
)
from distributed.test_central_mask import MIXTURES, TENSORIZED

from mpotrain.engine.base import Engine
from mpotrain.engine.config import CentralMaskConfig, DeepSpeedConfig, LocalConfig
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.nn.roles import experts_of
from mpotrain.parallel.ranks import World
from mpotrain.train.config import LambConfig


def test_local_engine_follows_the_paper() -> None:
    """The rule in float64 on gradients of plain autograd, clipped by torch."""
    engine = engine_of(CPU_WORLD, LOCAL)
    model = toy.build()
    exact = {name: p.detach().double() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in exact.items()}
    for step in range(STEPS):
        batches = toy.microbatches(step, rank=0, world=1)
        count = sum(batch.num_tokens for batch in batches)
        model.zero_grad()
        for batch in batches:
            (model(batch).loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        lr = rate(step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradient, t = parameter.grad.double(), step + 1
            m = 0.9 * moments[name][0] + 0.1 * gradient
            v = 0.999 * moments[name][1] + 0.001 * gradient**2
            moments[name] = (m, v)
            is_core, is_vector = parameter.ndim == 4, parameter.ndim == 1
            w = exact[name]
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6)
            update = update + (0.0 if is_vector else 0.05 if is_core else 0.1) * w
            trust = 1.0 if is_vector else float(w.norm() / update.norm())
            exact[name] = w - lr * (0.5 if is_core else 1.0) * trust * update
            parameter.data.copy_(exact[name])
        advance(engine, step, step + 1)
    wanted = {
        name: {"weight": exact[name], "exp_avg": moments[name][0], "exp_avg_sq": moments[name][1]}
        for name in exact
    }
    assert largest_difference(whole_state(engine), wanted) < 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_and_world_equals_local(run_ranks: Any, world: int, stage: int) -> None:
    settings = {"lamb": LAMB}
    assert_equal_to_local(run_ranks(world)(train, zero(stage), settings), settings)


@pytest.mark.parametrize("lamb", [EVERYTHING, BOUNDED], ids=["vectors", "bounds"])
@pytest.mark.parametrize("config", [zero(2), zero(3, persistence_threshold=0)])
def test_options_hold_in_split_layouts(
    run_ranks: Any, config: DeepSpeedConfig, lamb: LambConfig
) -> None:
    settings = {"lamb": lamb}
    assert_equal_to_local(run_ranks(4)(train, config, settings), settings)


@pytest.mark.parametrize(
    "config",
    [
        zero(1, offload_optimizer=True),
        zero(2, offload_optimizer=True),
        zero(3, offload_optimizer=True, offload_parameters=True),
    ],
)
def test_offload_equals_local(run_ranks: Any, config: DeepSpeedConfig) -> None:
    assert_equal_to_local(run_ranks(2)(train, config, {}), {})


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_norms_of_flat_vectors_are_caught(run_ranks: Any, world: int, stage: int) -> None:
    """What an optimizer does that knows nothing of ZeRO: one norm for each vector it is shown."""
    outcomes = run_ranks(world)(train, zero(stage), {"flat_norms": True})
    with pytest.raises(AssertionError):
        assert_equal_to_local(outcomes, {})
    _, wanted = train(CPU_WORLD, LOCAL, {})
    assert largest_difference(outcomes[0][1], wanted) > 1e-2


def layers(engine: Engine, state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of all layers that trust scales; every expert's part apart."""
    for name, parameter in engine.model.named_parameters():
        weight, per_expert = state[name]["weight"], experts_of(parameter) > 0
        if weight.ndim - per_expert > 1:
            parts = weight if per_expert else weight[None]
            yield from ((f"{name}[{n}]", part) for n, part in enumerate(parts))


def relative_lengths(
    world: World, config: DeepSpeedConfig | LocalConfig, settings: dict[str, Any]
) -> tuple[list[dict[str, float]], State]:
    """How far every layer moves in every step, as a part of lr and of its own norm."""
    engine = engine_of(world, config, **settings)
    states = [whole_state(engine)]
    for step in range(3):
        advance(engine, step, step + 1)
        states.append(whole_state(engine))
    lengths = []
    for step, (before, after) in enumerate(pairwise(states)):
        pairs = zip(layers(engine, before), layers(engine, after), strict=True)
        lr = rate(step)
        lengths.append(
            {name: float((new - old).norm() / old.norm()) / lr for (name, old), (_, new) in pairs}
        )
    engine.close()
    return lengths, states[-1]


@pytest.mark.parametrize(
    ("world", "config", "settings"),
    [
        (2, zero(1, dtype="bf16"), {}),
        (2, zero(2, dtype="bf16"), {}),
        (4, zero(3, dtype="bf16"), {}),
        (2, zero(2, dtype="bf16", offload_optimizer=True), {}),
        (2, zero(1, dtype="bf16"), {"model_section": MIXTURES, "expert_ranks": 2}),
        (4, zero(2, dtype="bf16"), {"model_section": MIXTURES, "expert_ranks": 2}),
        (4, zero(2), {"model_section": MIXTURES, "expert_ranks": 4}),
        (2, zero(3), {"model_section": MIXTURES}),
    ],
)
def test_masters_move_by_lr_times_their_norm(
    run_ranks: Any, world: int, config: DeepSpeedConfig, settings: dict[str, Any]
) -> None:
    """Without bounds every layer moves by lr times its norm, whatever bf16 does to gradients."""
    settings = settings | {"lamb": LambConfig(weight_decay=0.1)}
    outcomes = run_ranks(world)(relative_lengths, config, settings)
    for lengths, state in outcomes:
        assert same_bits(state, outcomes[0][1])
        for step in lengths:
            assert len(step) > 5
            # Masters are fp32 numbers: a step of 1 % of a weight keeps five digits.
            assert step == pytest.approx(dict.fromkeys(step, 1.0), rel=1e-4)


@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
@pytest.mark.parametrize(
    ("world", "config", "model", "expert_ranks"),
    [
        pytest.param(2, zero(0), TENSORIZED, 1, id="zero0"),
        pytest.param(2, zero(1), MIXTURES, 1, id="zero1"),
        pytest.param(4, zero(2), MIXTURES, 2, id="zero2-ep2"),
        pytest.param(2, zero(3), TENSORIZED, 1, id="zero3"),
        pytest.param(2, zero(1, offload_optimizer=True), MIXTURES, 2, id="offload-ep2"),
    ],
)
def test_resting_central_tensors_and_experts(
    run_ranks: Any,
    world: int,
    config: DeepSpeedConfig,
    model: GPT2Config,
    expert_ranks: int,
    granularity: Any,
) -> None:
    settings = {
        "model_section": model,
        "mask": CentralMaskConfig(probability=0.5, granularity=granularity),
    }
    outcomes = run_ranks(world)(train, config, settings | {"expert_ranks": expert_ranks})
    assert_equal_to_local(outcomes, settings)
    _, unmasked = train(CPU_WORLD, LOCAL, {"model_section": model})
    assert largest_difference(outcomes[0][1], unmasked) > 1e-3
