"""Training with parts of transformer-engine and apex, played by stand-ins, is the same training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.engines import largest_difference, same_bits, whole_state
from distributed.megatron_cases import (
    GLOBAL,
    GPT_MOE,
    GPT_TTM,
    LR,
    MICRO,
    MPOBERT,
    ONE,
    OVERLAP,
    PLAIN,
    SP,
    SPLIT,
    T5_MOE,
    Layout,
    local_engine,
    megatron_engine,
    one_batch,
    run_steps,
)
from distributed.megatron_stand_ins import stand_ins

from mpotrain.batch import Batch
from mpotrain.engine.base import Engine
from mpotrain.engine.config import CentralMaskConfig
from mpotrain.models.config import AnyModel
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World
from mpotrain.train.config import LambConfig

Run = Callable[[int], Callable[..., list[Any]]]
Documents = Callable[[int], bool]
CP = ParallelConfig(context=2)
# Heads of 8 features: transformer-engine has no fused kernel for those of 4.
WIDE_HEADS: dict[str, AnyModel] = {
    "gpt": replace(GPT_TTM, num_heads=2),
    "moe": replace(GPT_MOE, num_heads=2),
    "mpobert": replace(MPOBERT, num_heads=2),
    "t5": replace(T5_MOE, num_heads=2, head_size=8),
}


def nowhere(number: int) -> bool:
    return False


def everywhere(number: int) -> bool:
    return True


def somewhere(number: int) -> bool:
    return number % 4 == 1


def batches_of(engine: Engine, model: AnyModel, step: int, marked: Documents) -> list[Batch]:
    """This rank's micro-batches, some of them with two documents in a sequence."""
    found = []
    for number in range(engine.world.data_rank, GLOBAL // MICRO, engine.world.data_size):
        batch = one_batch(model, step, number)
        documents = torch.ones_like(batch.inputs)
        documents[:, 10:] = 2
        found.append(replace(batch, document_ids=documents if marked(number) else None))
    return found


def train(
    engine: Engine, model: AnyModel, steps: range, marked: Documents
) -> list[tuple[float, ...]]:
    found = []
    for step in steps:
        batches = batches_of(engine, model, step, marked)
        result = engine.step(batches, lr=LR * (1 + step) / 4, step=step, detail=True)
        roles = result.grad_norm_by_role or {}
        found.append((result.loss, result.grad_norm, *(roles[role] for role in sorted(roles))))
    return found


def with_stand_ins(
    world: World, model: AnyModel, layout: Layout, marked: Documents, fp32_attention: bool = True
) -> Any:
    with stand_ins(fp32_attention=fp32_attention) as used:
        engine = megatron_engine(world, model, layout)
        try:
            return train(engine, model, range(5), marked), dict(used)
        finally:
            engine.close()


# Attentions in five steps of four micro-batches through four layers: all without documents.
EACH = 5 * 4 * 4
# Norms in as many micro-batches: two in a layer and a last one, in a decoder with memory three.
NORMS = {("gpt2", 1): [180], ("gpt2", 2): [80, 100], ("encoder", 1): [160], ("t5", 1): [240]}
CASES = [
    ("gpt", Layout(ONE, PLAIN), nowhere, EACH, "layer_norm"),
    ("gpt", Layout(SP, OVERLAP), nowhere, EACH, "layer_norm"),
    ("gpt", Layout(CP, SPLIT), nowhere, EACH, "layer_norm"),
    ("gpt", Layout(CP, SPLIT), somewhere, 3 * EACH // 4, "layer_norm"),
    ("gpt", Layout(ONE, SPLIT), everywhere, 0, "layer_norm"),
    ("gpt", Layout(ParallelConfig(pipeline=2), SPLIT), somewhere, 3 * EACH // 8, "layer_norm"),
    ("moe", Layout(replace(SP, expert=2), SPLIT), somewhere, 3 * EACH // 4, "layer_norm"),
    ("mpobert", Layout(CP, PLAIN), nowhere, EACH, "layer_norm"),
    ("mpobert", Layout(SP, SPLIT), somewhere, 3 * EACH // 4, "layer_norm"),
    ("t5", Layout(SP, SPLIT), nowhere, 0, "rms_norm"),
]


@pytest.mark.parametrize(("name", "layout", "marked", "attentions", "norms"), CASES)
def test_training_equals_the_local_engine(
    run_ranks: Run, name: str, layout: Layout, marked: Documents, attentions: int, norms: str
) -> None:
    model = WIDE_HEADS[name]
    wanted = train(local_engine(model), model, range(5), marked)
    for steps, used in run_ranks(layout.ranks)(with_stand_ins, model, layout, marked):
        for found, expected in zip(steps, wanted, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        assert used.get("attention", 0) == attentions
        assert used[norms] in NORMS[model.kind, layout.parallel.pipeline]
        assert used["adam"] in (5, 10)  # an optimizer for dense parameters, one for experts


def test_recomputed_layers_take_the_kernels_again(run_ranks: Run) -> None:
    model = replace(WIDE_HEADS["mpobert"], activation_checkpointing=True)
    wanted = train(local_engine(model), model, range(5), nowhere)
    layout = Layout(SP, SPLIT)
    for steps, used in run_ranks(2)(with_stand_ins, model, layout, nowhere):
        for found, expected in zip(steps, wanted, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        assert used["attention"] == 2 * EACH


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attention_is_taken_for_what_it_has_kernels_for(
    run_ranks: Run, heads: int, dtype: Any
) -> None:
    model = replace(GPT_TTM, num_heads=heads)
    wanted = train(local_engine(model), model, range(5), nowhere)
    layout = Layout(ONE, replace(SPLIT, dtype=dtype))
    [(steps, used)] = run_ranks(1)(with_stand_ins, model, layout, nowhere, False)
    assert used.get("attention", 0) == (EACH if dtype == "bf16" and heads == 2 else 0)
    assert used["layer_norm"] == 5 * 4 * 9
    for found, expected in zip(steps, wanted, strict=True):
        assert found[0] == pytest.approx(expected[0], rel=2e-3 if dtype == "bf16" else 1e-5)


@pytest.mark.parametrize("setting", ["off", "auto"])
def test_off_is_the_same_to_the_bit_as_without_packages(run_ranks: Run, setting: Any) -> None:
    model, layout = WIDE_HEADS["gpt"], Layout(SP, SPLIT)
    off = replace(layout, engine=replace(SPLIT, extensions=setting))
    for bare, (steps, used) in zip(
        run_ranks(2)(without_packages, model, layout),
        run_ranks(2)(with_stand_ins, model, off, nowhere),
        strict=True,
    ):
        assert (used == {}) == (setting == "off")
        assert (steps == bare) == (setting == "off")


def without_packages(world: World, model: AnyModel, layout: Layout) -> Any:
    engine = megatron_engine(world, model, layout)
    try:
        return train(engine, model, range(5), nowhere)
    finally:
        engine.close()


def test_lamb_stays_lamb(run_ranks: Run) -> None:
    lamb = LambConfig(weight_decay=0.05, max_trust=5.0)
    model, layout = WIDE_HEADS["mpobert"], Layout(SP, PLAIN, optimizer=lamb)
    wanted = train(local_engine(model, optimizer=lamb), model, range(5), nowhere)
    for steps, used in run_ranks(2)(with_stand_ins, model, layout, nowhere):
        assert "adam" not in used
        for found, expected in zip(steps, wanted, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def counters_of(engine: Any) -> list[tuple[str, Any]]:
    """Number of updates in each group of the fused Adam."""
    groups = [group for inner in engine._optimizers.inner for group in inner.param_groups]
    return [(group["name"], group.get("step")) for group in groups if group["params"]]


def handed_over(world: World, model: AnyModel, first: Layout, second: Layout) -> Any:
    """Train in one setting, go on in an engine of another that has gone astray before."""
    with stand_ins():
        engine = megatron_engine(world, model, first)
        try:
            run_steps(engine, model, range(3))
            before, counters = whole_state(engine), engine.counters()
        finally:
            engine.close()
        engine = megatron_engine(world, model, second)
        try:
            run_steps(engine, model, [7])
            engine.import_state(lambda name: before[name], 3, counters)
            after, counted = whole_state(engine), counters_of(engine)
            steps = run_steps(engine, model, range(3, 5))
            return before, after, counters, counted, steps, whole_state(engine)
        finally:
            engine.close()


MASK = CentralMaskConfig(probability=0.5, granularity="tensor")
FUSED, TORCH = Layout(SP, SPLIT, mask=MASK), Layout(SP, replace(PLAIN, extensions="off"), mask=MASK)
PATHS = [(FUSED, FUSED), (FUSED, TORCH), (TORCH, FUSED), (FUSED, replace(FUSED, engine=PLAIN))]


@pytest.mark.parametrize(("first", "second"), PATHS)
def test_runs_go_on_with_counters_in_groups(run_ranks: Run, first: Layout, second: Layout) -> None:
    model = WIDE_HEADS["gpt"]
    local = local_engine(model, mask=MASK)
    wanted = run_steps(local, model, range(5))
    for before, after, counters, counted, steps, end in run_ranks(2)(
        handed_over, model, first, second
    ):
        assert same_bits(before, after)
        assert len(set(counters.values())) > 1  # some central tensors have rested more than others
        for found, expected in zip(steps, wanted[3:], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        ours = {k: v for k, v in end.items() if not k.endswith("qkv.bias")}
        theirs = {k: v for k, v in whole_state(local).items() if not k.endswith("qkv.bias")}
        assert largest_difference(ours, theirs) < 2e-4
        if second is TORCH:
            assert {count for _, count in counted} == {None}
        else:
            for name, count in counted:
                assert count == counters.get(name.removeprefix("central:"), 3), name


def started_again(world: World, model: AnyModel, layout: Layout) -> Any:
    """Train, go back to the start weights without moments, and train again."""
    with stand_ins():
        engine = megatron_engine(world, model, layout)
        try:
            start = whole_state(engine)
            first = run_steps(engine, model, range(2))
            engine.import_state(lambda name: start[name], 0)
            return first, run_steps(engine, model, range(2))
        finally:
            engine.close()


def test_a_fresh_start_forgets_the_counters(run_ranks: Run) -> None:
    for first, again in run_ranks(2)(started_again, WIDE_HEADS["gpt"], Layout(SP, SPLIT)):
        assert first == again
