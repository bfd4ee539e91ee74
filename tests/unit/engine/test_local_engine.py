from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distributed import toy_model as toy

from mpotrain.engine.config import LocalConfig
from mpotrain.engine.local import LocalEngine
from mpotrain.errors import CheckpointError, ConfigError, ParallelError
from mpotrain.parallel.ranks import World, microbatch_seed

WORLD = World(0, 1, 0, torch.device("cpu"))
CLIP = 0.7


def engine_of(model: toy.ToyModel, *, clip: float | None = CLIP, seed: int = 5) -> LocalEngine:
    return LocalEngine(
        model,
        toy.build_optimizer(model),
        config=LocalConfig(device="cpu"),
        world=WORLD,
        seed=seed,
        clip_norm=clip,
    )


def step(engine: LocalEngine, number: int, **extra: Any) -> Any:
    batches = toy.microbatches(number, rank=0, world=1)
    return engine.step(batches, lr=toy.LR, step=number, **extra)


def state_of(engine: LocalEngine) -> dict[str, dict[str, torch.Tensor]]:
    return {s.name: dict(s.tensors or {}) for s in engine.export_state()}


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys()
        and all(torch.equal(a[name][k], b[name][k]) for k in a[name])
        for name in a
    )


def test_equals_a_plain_loop_over_the_whole_batch() -> None:
    """One backward over all samples at once, torch's own clipping: no code of the engine."""
    model = toy.build()
    reference = toy.build()
    optimizer = toy.build_optimizer(reference)
    engine = engine_of(model)
    clipped = 0
    for number in range(4):
        result = step(engine, number, detail=True)
        whole = toy.batch_of(range(16 * number, 16 * number + 16))
        output = reference(whole)
        loss = output.loss_sum / output.num_tokens
        optimizer.zero_grad()
        loss.backward()
        by_role: dict[str, float] = {"dense": 0.0, "central": 0.0, "auxiliary": 0.0}
        for name, parameter in reference.named_parameters():
            role = (
                "central" if "central" in name else "auxiliary" if parameter.ndim == 4 else "dense"
            )
            by_role[role] += float(parameter.grad.double().square().sum())
        norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), CLIP))
        clipped += norm > CLIP
        factors = {"cores": 0.5, "matrices": 1.0, "vectors": 2.0}
        for group in optimizer.param_groups:
            group["lr"] = toy.LR * factors[group["name"]]
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        assert result.grad_norm == pytest.approx(norm, rel=2e-6)
        assert result.grad_norm_by_role == pytest.approx(
            {role: math.sqrt(square) for role, square in by_role.items()}, rel=2e-6
        )
        assert result.num_tokens == int(output.num_tokens)
        assert (result.skipped, result.reason) == (False, None)
    assert clipped > 0
    assert engine.num_updates == 4
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_accumulation_does_not_change_the_step() -> None:
    results = []
    for micro in (1, 4, 16):
        engine = engine_of(toy.build())
        batches = toy.microbatches(0, rank=0, world=1, micro=micro)
        assert len(batches) == 16 // micro
        assert len({batch.num_tokens for batch in batches}) > 1 or micro == 16
        results.append(engine.step(batches, lr=toy.LR, step=0))
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-6)


def test_details_are_only_given_when_asked_for() -> None:
    assert step(engine_of(toy.build()), 0).grad_norm_by_role is None


def test_dropout_is_seeded_for_each_microbatch() -> None:
    model = toy.build(dropout=0.4)
    engine = engine_of(model)
    torch.manual_seed(999)
    result = step(engine, 3)
    reference = toy.build(dropout=0.4)
    total, count = 0.0, 0
    for m, batch in enumerate(toy.microbatches(3, rank=0, world=1)):
        torch.manual_seed(microbatch_seed(5, 3, m))
        output = reference(batch)
        total += output.loss_sum.item()
        count += int(output.num_tokens)
    assert result.loss == pytest.approx(total / count, rel=1e-6)


def test_refused_update_leaves_no_trace() -> None:
    engine = engine_of(toy.build())
    step(engine, 0)
    before = state_of(engine)
    seen: list[tuple[float, float]] = []

    def guard(loss: float, norm: float) -> str:
        seen.append((loss, norm))
        return "spike"

    result = step(engine, 1, guard=guard)
    assert (result.skipped, result.reason) == (True, "spike")
    assert seen == [(result.loss, result.grad_norm)]
    assert same_bits(state_of(engine), before)
    assert engine.num_updates == 1
    assert all(p.grad is None for p in engine.model.parameters())
    assert not step(engine, 1, guard=lambda *_: None).skipped


def test_nan_never_reaches_the_weights() -> None:
    model = toy.build()
    engine = engine_of(model)
    before = state_of(engine)
    model.poisoned_sample = 3
    result = step(engine, 0)
    assert result.skipped
    assert math.isnan(result.grad_norm)
    assert same_bits(state_of(engine), before)


def test_batch_without_targets_is_skipped() -> None:
    engine = engine_of(toy.build())
    batch = toy.batch_of(range(2))
    batch.loss_mask.fill_(False)
    result = engine.step([batch], lr=0.1, step=0)
    assert (result.loss, result.num_tokens, result.skipped) == (0.0, 0, True)


def test_import_resumes_bitwise() -> None:
    engine = engine_of(toy.build())
    for number in range(3):
        step(engine, number)
    middle = state_of(engine)
    wanted = [step(engine, number) for number in (3, 4)]
    fresh = engine_of(toy.build(seed=8))
    step(fresh, 9)
    fresh.import_state(middle.__getitem__, 3)
    assert same_bits(state_of(fresh), middle)
    assert [step(fresh, number) for number in (3, 4)] == wanted
    assert same_bits(state_of(fresh), state_of(engine))
    fresh.import_state(lambda name: {"weight": middle[name]["weight"]}, 0)
    assert state_of(fresh).keys() == middle.keys()
    assert all(tensors.keys() == {"weight"} for tensors in state_of(fresh).values())


def test_export_names_roles_and_shapes() -> None:
    engine = engine_of(toy.build())
    states = list(engine.export_state())
    assert [s.name for s in states] == [n for n, _ in engine.model.named_parameters()]
    roles = {s.name: str(s.role) for s in states}
    assert roles["central"] == "central"
    assert roles["layers.1.left"] == "auxiliary"
    assert roles["embedding.weight"] == "dense"
    assert {s.name: s.shape for s in states}["central"] == (3, 2, 2, 5)


def test_import_of_another_model_is_refused() -> None:
    engine = engine_of(toy.build())
    wrong = {name: {"weight": torch.zeros(1)} for name in state_of(engine)}
    with pytest.raises(CheckpointError, match="position: weight"):
        engine.import_state(wrong.__getitem__, 0)


def test_evaluation_drops_nothing_and_restores_the_mode() -> None:
    model = toy.build(dropout=0.5)
    engine = engine_of(model)
    batches = [toy.batch_of(range(3)), toy.batch_of(range(3, 7))]
    held = engine.evaluate(iter(batches))
    assert model.training
    plain = toy.build()
    wanted = plain(toy.batch_of(range(7)))
    assert held.loss_sum == pytest.approx(wanted.loss_sum.item(), rel=1e-5)
    assert held.num_tokens == int(wanted.num_tokens)
    with engine.full_parameters():
        assert model.central.shape == (3, 2, 2, 5)
    engine.close()


def test_unused_parameter_counts_as_zero_gradient() -> None:
    model = toy.build()
    model.spare = torch.nn.Parameter(torch.ones(2))
    engine = engine_of(model)
    step(engine, 0)
    states = state_of(engine)
    assert states["spare"]["exp_avg"].tolist() == [0.0, 0.0]


def test_wrong_worlds_and_optimizers_are_refused() -> None:
    model = toy.build()
    with pytest.raises(ParallelError, match="one process"):
        LocalEngine(
            model,
            toy.build_optimizer(model),
            config=LocalConfig(),
            world=World(0, 2, 0, torch.device("cpu"), "gloo"),
            seed=0,
            clip_norm=None,
        )
    with pytest.raises(ConfigError, match="lr_factor"):
        LocalEngine(
            model,
            torch.optim.AdamW(model.parameters()),
            config=LocalConfig(),
            world=WORLD,
            seed=0,
            clip_norm=None,
        )
    half = toy.build().bfloat16()
    with pytest.raises(ConfigError, match=r"embedding.weight: torch.bfloat16"):
        engine_of(half)
