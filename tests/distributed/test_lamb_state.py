"""State of LAMB: resumes, other layouts, other optimizers; layers of mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed.engines import (
    CPU_WORLD,
    State,
    deepspeed_engine,
    largest_difference,
    local_engine,
    same_bits,
    whole_state,
    zero,
)
from distributed.lamb_cases import (
    CLIP,
    LOCAL,
    advance,
    engine_of,
)
from distributed.mixture_model import engine_of as mixture_engine
from distributed.mixture_model import model_config
from distributed.test_central_mask import MIXTURES

from mpotrain.engine.config import CentralMaskConfig, DeepSpeedConfig, LocalConfig
from mpotrain.nn.roles import experts_of
from mpotrain.parallel.ranks import World
from mpotrain.train.lamb import Lamb


def resume(
    world: World, config: DeepSpeedConfig | LocalConfig, settings: dict[str, Any]
) -> tuple[bool, bool, bool]:
    engine = engine_of(world, config, **settings)
    advance(engine, 0, 2)
    middle, counters = whole_state(engine), engine.counters()
    wanted = advance(engine, 2, 4)
    wanted_end = whole_state(engine)
    engine.close()
    fresh = engine_of(world, config, **settings, seed=99)
    advance(fresh, 7, 8)
    fresh.import_state(middle.__getitem__, 2, counters)
    lossless = same_bits(whole_state(fresh), middle)
    same = [r.loss for r in advance(fresh, 2, 4)] == [r.loss for r in wanted]
    same_end = same_bits(whole_state(fresh), wanted_end)
    fresh.close()
    return lossless, same, same_end


MASKED: dict[str, Any] = {
    "model_section": MIXTURES,
    "mask": CentralMaskConfig(probability=0.5, granularity="tensor"),
}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (zero(0), {}),
        (zero(1), MASKED | {"expert_ranks": 2}),
        (zero(1, dtype="bf16"), {}),
        (zero(2, offload_optimizer=True), {}),
        (zero(3, dtype="bf16"), {}),
    ],
)
def test_same_layout_resumes_bitwise(
    run_ranks: Any, config: DeepSpeedConfig, settings: dict[str, Any]
) -> None:
    assert run_ranks(2)(resume, config, settings) == [(True, True, True)] * 2


def test_local_engine_resumes_bitwise() -> None:
    assert resume(CPU_WORLD, LOCAL, MASKED) == (True, True, True)


LAYOUTS: list[tuple[int, DeepSpeedConfig | LocalConfig]] = [
    (1, LOCAL),
    (2, zero(0)),
    (4, zero(1)),
    (2, zero(2)),
    (4, zero(3)),
]


def refuse_and_go_on(world: World, config: DeepSpeedConfig | LocalConfig) -> tuple[bool, State]:
    """Refuse a step in the middle, which must leave no trace."""
    engine = engine_of(world, config)
    advance(engine, 0, 2)
    before = whole_state(engine)
    advance(engine, 2, 3, guard=lambda loss, norm: "no")
    after = whole_state(engine)
    engine.close()
    return same_bits(before, after), after


def go_on(
    world: World, config: DeepSpeedConfig | LocalConfig, middles: list[State]
) -> list[tuple[bool, State]]:
    outcomes = []
    for middle in middles:
        engine = engine_of(world, config, seed=99)
        engine.import_state(middle.__getitem__, 2)
        lossless = same_bits(whole_state(engine), middle)
        advance(engine, 3, 5)
        outcomes.append((lossless, whole_state(engine)))
        engine.close()
    return outcomes


def test_state_moves_between_layouts(run_ranks: Any) -> None:
    sources = [run_ranks(world)(refuse_and_go_on, config)[0] for world, config in LAYOUTS]
    assert all(untouched for untouched, _ in sources)
    middles = [middle for _, middle in sources]
    wanted = go_on(CPU_WORLD, LOCAL, middles[:1])[0][1]
    for world, config in LAYOUTS:
        for lossless, final in run_ranks(world)(go_on, config, middles)[0]:
            assert lossless
            assert largest_difference(final, wanted) < 2e-5


def adamw_state(world: World) -> State:
    engine = deepspeed_engine(world, zero(2), clip=CLIP)
    advance(engine, 0, 2)
    state = whole_state(engine)
    engine.close()
    return state


def test_runs_pass_between_adamw_and_lamb(run_ranks: Any) -> None:
    """Both keep the same moments; what comes after differs."""
    middle = run_ranks(2)(adamw_state)[0]
    ((lossless, lamb),) = run_ranks(2)(go_on, zero(1), [middle])[0]
    assert lossless
    assert largest_difference(lamb, go_on(CPU_WORLD, LOCAL, [middle])[0][1]) < 1e-5
    back = local_engine()
    back.import_state(lamb.__getitem__, 4)
    assert same_bits(whole_state(back), lamb)
    (result,) = advance(back, 5, 6)
    assert not result.skipped


def test_mixture_layers_of_experts_do_not_depend_on_how_they_are_stacked() -> None:
    """Two models that differ in the size of one expert: the others move as before."""

    def moved(scale: float) -> dict[str, torch.Tensor]:
        engine = engine_of(CPU_WORLD, LOCAL, model_section=model_config(dropout=0.0))
        names = [n for n, p in engine.model.named_parameters() if experts_of(p)]
        weights = {name: engine.model.get_parameter(name) for name in names}
        for weight in weights.values():
            weight.data[0] *= scale
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        generator = torch.Generator().manual_seed(0)
        optimizer = engine._optimizer  # type: ignore[attr-defined]
        for parameter in engine.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        return {name: weight.detach() - before[name] for name, weight in weights.items()}

    one, ten = moved(1.0), moved(10.0)
    for name in one:
        assert torch.equal(one[name][1:], ten[name][1:]), name
    assert any(not torch.allclose(one[name][0], ten[name][0], rtol=0.5) for name in one)


def test_adamw_knows_no_layers() -> None:
    engine = mixture_engine(CPU_WORLD, LOCAL, model_config())
    assert not isinstance(engine._optimizer, Lamb)  # type: ignore[attr-defined]
