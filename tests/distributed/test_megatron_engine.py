"""The Megatron engine behind the seam of engines: state, statistics, masks, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.engines import largest_difference, same_bits, whole_state
from distributed.megatron_cases import (
    LR,
    OVERLAP,
    PLAIN,
    SP,
    SPLIT,
    Layout,
    build,
    local_engine,
    megatron_engine,
    microbatches,
    network,
    one_batch,
    run_steps,
)

from mpotrain.engine.config import CentralMaskConfig
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.errors import ConfigError
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World
from mpotrain.train.config import LambConfig

Run = Callable[[int], Callable[..., list[Any]]]
CASES = {
    "gpt-ttm": Layout(replace(SP, pipeline=2, virtual_pipeline=2), OVERLAP),
    "gpt-moe": Layout(replace(SP, expert=2, data=2), OVERLAP),
    "mpobert": Layout(ParallelConfig(pipeline=2, virtual_pipeline=2, data=2), SPLIT),
    "t5-moe": Layout(replace(SP, expert=2, expert_tensor=2), PLAIN),
}


def trained(world: World, name: str, layout: Layout, steps: int) -> Any:
    model = network(name)
    engine = megatron_engine(world, model, layout)
    try:
        run_steps(engine, model, range(steps))
        return whole_state(engine), engine.counters()
    finally:
        engine.close()


@pytest.mark.parametrize("name", list(CASES))
def test_start_weights_are_those_of_the_local_engine(run_ranks: Run, name: str) -> None:
    wanted = {n: p.detach() for n, p in build(network(name)).named_parameters()}
    for state, _ in run_ranks(CASES[name].ranks)(trained, name, CASES[name], 0):
        weights = {n: kinds["weight"] for n, kinds in state.items() if not n.endswith("balance")}
        assert weights.keys() == wanted.keys()
        for key, weight in weights.items():
            assert torch.equal(weight, wanted[key]), key


@pytest.mark.parametrize("name", list(CASES))
def test_weights_and_moments_follow_the_local_engine(run_ranks: Run, name: str) -> None:
    local = local_engine(network(name))
    run_steps(local, network(name), range(3))
    wanted = whole_state(local)
    for state, _ in run_ranks(CASES[name].ranks)(trained, name, CASES[name], 3):
        # The gradient of a key bias is zero but for rounding, which Adam blows up.
        ours = {k: v for k, v in state.items() if not k.endswith("qkv.bias")}
        theirs = {k: v for k, v in wanted.items() if not k.endswith("qkv.bias")}
        assert largest_difference(ours, theirs) < 2e-4


def handed_over(world: World, name: str, first: Layout, second: Layout) -> Any:
    """Train in one layout, go on in another; state before and after the hand-over."""
    model = network(name)
    engine = megatron_engine(replace(world, parallel=first.parallel), model, first)
    try:
        run_steps(engine, model, range(2))
        before, counters = whole_state(engine), engine.counters()
    finally:
        engine.close()
    engine = megatron_engine(world, model, second)
    try:
        engine.import_state(lambda key: before[key], 2, counters)
        after = whole_state(engine)
        return before, after, run_steps(engine, model, range(2, 4))
    finally:
        engine.close()


PATHS = [
    ("gpt-moe", Layout(replace(SP, pipeline=2), OVERLAP), Layout(ParallelConfig(expert=4), PLAIN)),
    ("mpobert", Layout(ParallelConfig(pipeline=4), PLAIN), Layout(replace(SP, data=2), OVERLAP)),
    ("t5-moe", Layout(replace(SP, expert=2), SPLIT), Layout(ParallelConfig(data=4), SPLIT)),
]


@pytest.mark.parametrize(("name", "first", "second"), PATHS)
def test_state_moves_bit_for_bit_and_the_curve_goes_on(
    run_ranks: Run, name: str, first: Layout, second: Layout
) -> None:
    wanted = run_steps(local_engine(network(name)), network(name), range(4))
    for before, after, steps in run_ranks(4)(handed_over, name, first, second):
        assert same_bits(before, after)
        for found, expected in zip(steps, wanted[2:], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def told(world: World, name: str, layout: Layout) -> Any:
    model = network(name)
    engine = megatron_engine(world, model, layout)
    try:
        batches = microbatches(model, 0, engine.world.data_rank, engine.world.data_size)
        result = engine.step(batches, lr=LR, step=0, detail=True)
        return result.statistics, result.grad_norm_by_role, result.num_tokens
    finally:
        engine.close()


@pytest.mark.parametrize("name", list(CASES))
def test_statistics_and_norms_of_roles(run_ranks: Run, name: str) -> None:
    wanted = local_engine(network(name)).step(
        microbatches(network(name), 0), lr=LR, step=0, detail=True
    )
    assert wanted.grad_norm_by_role is not None
    for statistics, norms, num_tokens in run_ranks(CASES[name].ranks)(told, name, CASES[name]):
        assert num_tokens == wanted.num_tokens
        assert norms == pytest.approx(wanted.grad_norm_by_role, rel=1e-5)
        assert statistics.keys() == wanted.statistics.keys()
        for key, value in wanted.statistics.items():
            torch.testing.assert_close(statistics[key], value, rtol=1e-5, atol=1e-6)


def skipping(world: World, name: str, layout: Layout) -> Any:
    model = network(name)
    engine = megatron_engine(world, model, layout)
    try:
        run_steps(engine, model, [0])
        before = whole_state(engine)
        batches = microbatches(model, 1, engine.world.data_rank, engine.world.data_size)
        result = engine.step(batches, lr=LR, step=1, guard=lambda loss, norm: "not today")
        kept = same_bits(before, whole_state(engine))
        answer = (result.skipped, result.reason, kept, engine.num_updates)
        return answer, run_steps(engine, model, [2])[0]
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["gpt-moe", "mpobert"])
def test_a_skipped_update_changes_nothing(run_ranks: Run, name: str) -> None:
    local = local_engine(network(name))
    run_steps(local, network(name), [0])
    [wanted] = run_steps(local, network(name), [2])
    for answer, step in run_ranks(CASES[name].ranks)(skipping, name, CASES[name]):
        assert answer == (True, "not today", True, 1)
        assert step == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
@pytest.mark.parametrize("name", ["gpt-moe", "gpt-ttm"])
def test_masked_central_tensors(run_ranks: Run, name: str, granularity: Any) -> None:
    mask = CentralMaskConfig(probability=0.5, granularity=granularity)
    local = local_engine(network(name), mask=mask)
    run_steps(local, network(name), range(3))
    wanted = {k: v for k, v in whole_state(local).items() if "central" in k or "cores" in k}
    layout = Layout(replace(SP, data=2), OVERLAP, mask=mask)
    start = dict(build(network(name)).named_parameters())
    for state, counters in run_ranks(4)(trained, name, layout, 3):
        assert counters == local.counters()
        assert largest_difference({k: state[k] for k in wanted}, wanted) < 2e-4
        for key, kinds in wanted.items():
            rests = kinds["weight"] == start[key]
            assert torch.equal(rests, state[key]["weight"] == start[key]), key


def evaluated(world: World, name: str, layout: Layout, count: int) -> Any:
    model = network(name)
    engine = megatron_engine(world, model, layout)
    try:
        run_steps(engine, model, [0])
        rank, size = engine.world.data_rank, engine.world.data_size
        mine = [one_batch(model, 9, n) for n in range(rank, count, size)]
        first = engine.evaluate(iter(mine))
        return first, engine.evaluate(iter(mine)), run_steps(engine, model, [1])
    finally:
        engine.close()


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("count", [1, 5])
def test_evaluation_of_uneven_parts(run_ranks: Run, name: str, count: int) -> None:
    local, model = local_engine(network(name)), network(name)
    run_steps(local, model, [0])
    wanted = local.evaluate(one_batch(model, 9, n) for n in range(count))
    [step] = run_steps(local, model, [1])
    answers = run_ranks(CASES[name].ranks)(evaluated, name, CASES[name], count)
    for first, second, steps in answers:
        assert (first.loss_sum, first.num_tokens) == (second.loss_sum, second.num_tokens)
        assert first.num_tokens == wanted.num_tokens
        assert first.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-5)
        assert first.statistics.keys() == wanted.statistics.keys()
        for key, value in wanted.statistics.items():
            torch.testing.assert_close(first.statistics[key], value, rtol=1e-5, atol=1e-6)
        assert steps[0] == pytest.approx(step, rel=1e-5)


def evaluated_late(world: World) -> Any:
    model = network("gpt-moe")
    engine = megatron_engine(world, model, Layout(ParallelConfig(expert=2)))
    nothing = engine.evaluate([])
    rank = engine.world.data_rank
    # Of other lengths on other ranks, whose experts work for each other.
    mine = [one_batch(model, 9, rank, rows=rows) for rows in ((1, 2) if rank else (2, 2))]
    result = engine.evaluate(mine)
    engine.close()
    engine.close()
    return nothing.num_tokens, sorted(result.statistics), result.num_tokens


def test_an_evaluation_without_any_batch_settles_nothing(run_ranks: Run) -> None:
    for num_nothing, names, num_tokens in run_ranks(2)(evaluated_late):
        assert num_nothing == 0
        assert "correct" in names
        assert "expert_tokens" in names
        assert num_tokens > 0


def failed(world: World) -> tuple[str, int]:
    from mpotrain.engine.megatron import cpu

    mask = CentralMaskConfig(probability=0.5, granularity="element")
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    with pytest.raises(ConfigError) as caught:
        megatron_engine(world, network("mpobert"), Layout(parallel, mask=mask))
    # Nothing of it is left: other degrees can be started.
    megatron_engine(world, network("mpobert"), Layout(ParallelConfig(tensor=2))).close()
    return str(caught.value), cpu._shim.installed


def test_elements_of_copies_are_not_masked_and_a_failed_start_leaves_nothing(
    run_ranks: Run,
) -> None:
    for text, installed in run_ranks(2)(failed):
        assert "train.central_mask.granularity" in text
        assert installed == 0


def opened(world: World, name: str, layout: Layout) -> Any:
    model = network(name)
    engine = megatron_engine(world, model, layout)
    try:
        run_steps(engine, model, [0])
        state = whole_state(engine)
        with engine.full_parameters():
            equal = all(
                torch.equal(p.cpu(), state[n]["weight"]) for n, p in engine.model.named_parameters()
            )
            alone = None
            if world.rank == world.size - 1:
                engine.model.eval()
                with torch.no_grad():
                    alone = float(engine.model(one_batch(model, 9, 0)).loss_sum)
        held = sum(p.untyped_storage().nbytes() for p in engine.model.parameters())
        whole = engine.evaluate([one_batch(model, 9, 0)] * (engine.world.data_rank == 0)).loss_sum
        return equal, alone, held, whole
    finally:
        engine.close()


@pytest.mark.parametrize("name", list(CASES))
def test_the_model_is_whole_inside_the_block_alone(run_ranks: Run, name: str) -> None:
    answers = run_ranks(CASES[name].ranks)(opened, name, CASES[name])
    assert all(equal for equal, *_ in answers)
    assert answers[-1][1] == pytest.approx(answers[-1][3], rel=1e-5)
    num_parameters = len(list(build(network(name)).parameters()))
    assert all(held <= 4 * num_parameters for _, _, held, _ in answers)


LAMB = LambConfig(weight_decay=0.05, max_trust=5.0)


@pytest.mark.parametrize("name", ["gpt-moe", "mpobert", "t5-moe"])
def test_lamb_takes_norms_of_whole_layers(run_ranks: Run, name: str) -> None:
    local = local_engine(network(name), optimizer=LAMB)
    wanted = run_steps(local, network(name), range(4))
    parallel = SP if name == "mpobert" else replace(SP, expert=2, expert_tensor=2)
    layout = Layout(parallel, PLAIN, optimizer=LAMB)
    for steps in run_ranks(layout.ranks)(stepped, name, layout):
        for found, expected in zip(steps, wanted, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def stepped(world: World, name: str, layout: Layout) -> Any:
    engine = megatron_engine(world, network(name), layout)
    try:
        return run_steps(engine, network(name), range(4))
    finally:
        engine.close()


def refused(world: World) -> str:
    with pytest.raises(ConfigError) as caught:
        megatron_engine(world, network("mpobert"), Layout(SP, SPLIT, optimizer=LAMB))
    return str(caught.value)


def test_lamb_refuses_the_distributed_optimizer(run_ranks: Run) -> None:
    for text in run_ranks(2)(refused):
        assert "engine.distributed_optimizer" in text
        assert "false" in text


@pytest.mark.parametrize("engine", [PLAIN, OVERLAP], ids=["whole", "split"])
def test_bf16_weights_have_fp32_masters(run_ranks: Run, engine: MegatronConfig) -> None:
    wanted = run_steps(local_engine(network("gpt-ttm")), network("gpt-ttm"), range(4))
    layout = Layout(replace(SP, pipeline=2), replace(engine, dtype="bf16"))
    start = build(network("gpt-ttm")).state_dict()
    for steps in run_ranks(4)(stepped, "gpt-ttm", layout):
        for (loss, norm, *_), (expected, wanted_norm, *_) in zip(steps, wanted, strict=True):
            assert loss == pytest.approx(expected, rel=2e-3)
            assert norm == pytest.approx(wanted_norm, rel=5e-2)
    for state, _ in run_ranks(4)(trained, "gpt-ttm", layout, 0):
        # No master is the rounded weight.
        assert all(torch.equal(kinds["weight"], start[n]) for n, kinds in state.items())
