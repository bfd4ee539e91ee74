"""Mixtures under every kind of parallelism against the local mixture, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import megatron_mixture as mix
from distributed.megatron_grid import megatron_grid
from distributed.megatron_mixture import Case, compare

from mpotrain.errors import ParallelError
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

SWITCH: dict[str, Any] = {"bias": True}
MPOE = {"gate": "straight_through", "gate_at": "input", "bias": True, "balance_rate": 1e-3}
INPUT = {"gate_at": "input"}
TOP_2 = {"top_k": 2}
PLAIN_TOP_2 = {"top_k": 2, "normalise": False, "balance_rate": 1e-3}
BALANCED = {"balance_rate": 1e-3}

CASES = {
    "published, switch": Case(router=SWITCH),
    "published, mpoe, factored": Case(router=MPOE, plan="factored"),
    "published, top-2, grouped": Case(router=TOP_2, plan="grouped", dispatcher="allgather"),
    "outside, top-2": Case(mix.OUTSIDE, TOP_2),
    "outside, input": Case(mix.OUTSIDE, INPUT, "allgather"),
    "across, plain top-2": Case(mix.ACROSS, PLAIN_TOP_2),
    "across, switch": Case(mix.ACROSS, SWITCH, "allgather"),
    "asymmetric, mpoe": Case(mix.ASYMMETRIC, MPOE),
    "asymmetric, top-2, factored": Case(mix.ASYMMETRIC, TOP_2, "allgather", "factored"),
    "dense, switch": Case(mix.DENSE, SWITCH),
    "dense, top-2": Case(mix.DENSE, TOP_2, "allgather"),
    "half dense, mpoe": Case(mix.HALF_DENSE, MPOE),
    "one expert has all": Case(router=BALANCED, favourite=1),
    "one dense expert has all": Case(mix.DENSE, BALANCED, "allgather", favourite=2),
    "recomputed": Case(mix.ACROSS, TOP_2, recompute=True),
}
LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "ep2": (2, ParallelConfig(expert=2)),
    "ep4": (4, ParallelConfig(expert=4)),
    "ep2 edp2": (4, ParallelConfig(expert=2)),
    "tp2 sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "tp2 sp ep2": (2, ParallelConfig(tensor=2, sequence=True, expert=2)),
    "tp2 sp etp2": (2, ParallelConfig(tensor=2, sequence=True, expert_tensor=2)),
    "tp2 sp ep2 dp2": (4, ParallelConfig(tensor=2, sequence=True, expert=2)),
    "tp2 sp ep4 dp2": (4, ParallelConfig(tensor=2, sequence=True, expert=4)),
    "tp2 sp etp2 dp2": (4, ParallelConfig(tensor=2, sequence=True, expert_tensor=2)),
    "tp2 sp ep2 etp2": (4, ParallelConfig(tensor=2, sequence=True, expert=2, expert_tensor=2)),
    "cp2": (2, ParallelConfig(context=2)),
    "cp2 ep2": (2, ParallelConfig(context=2, expert=2)),
    "cp2 tp2 sp ep2": (4, ParallelConfig(context=2, tensor=2, sequence=True, expert=2)),
    "cp2 tp2 sp ep2 etp2": (
        4,
        ParallelConfig(context=2, tensor=2, sequence=True, expert=2, expert_tensor=2),
    ),
}
STATISTICS = (
    "expert_tokens", "dropped", "routed", "balance_loss", "z_loss", "router_entropy", "tokens",
)  # fmt: skip


def worst(outcomes: list[dict[str, dict[str, float]]], case: str) -> dict[str, float]:
    """Return the largest difference over the ranks of each quantity of a case."""
    return {what: max(o[case][what] for o in outcomes) for what in outcomes[0][case]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_local_mixture(run_ranks: Any, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    outcomes = run_ranks(world)(compare, parallel, CASES)
    for case in CASES:
        for what, error in worst(outcomes, case).items():
            # Statistics are told in fp32.
            assert error < (1e-6 if what in STATISTICS else 1e-12), (case, what, error)


def test_every_kind_of_cut_is_met(run_ranks: Any) -> None:
    """The cases above cut what they are named after; otherwise they would prove less."""
    parallel = ParallelConfig(tensor=2, sequence=True, expert_tensor=2)
    cut = run_ranks(2)(cut_tensors, parallel, CASES)[0]
    central, biases = "c_fc.central", {"c_fc.bias"}
    assert cut["published, switch"] == {central, "c_proj.central"} | biases
    assert cut["outside, top-2"] == {"c_fc.auxiliaries.1", "c_proj.auxiliaries.1"} | biases
    assert cut["across, switch"] == {central, "c_proj.auxiliaries.0"} | biases
    assert cut["dense, switch"] == {"c_fc.weight", "c_proj.weight"} | biases


def cut_tensors(
    world: World, parallel: ParallelConfig, cases: dict[str, Case]
) -> dict[str, set[str]]:
    from mpotrain.engine.megatron.placement import placement_of

    with megatron_grid(world, parallel):
        found = {}
        for name, case in cases.items():
            placements = map(placement_of, mix.engine_mixture(case, parallel).parameters())
            found[name] = {p.name.removeprefix(f"{mix.NAME}.") for p in placements if p.cuts}
        return found


@pytest.mark.parametrize(
    ("layout", "break_it", "site", "wrong"),
    [
        ("ep2", "central as expert", mix.PUBLISHED, {"c_fc.central", "c_proj.central"}),
        ("tp2 sp", "nothing is partial", mix.PUBLISHED, {"c_fc.central", "router.weight"}),
        ("tp2 sp ep2", "nothing is partial", mix.PUBLISHED, {"c_fc.central", "c_proj.central"}),
        ("tp2 sp etp2", "bias on every rank", mix.DENSE, {"output", "router.weight"}),
        ("tp2 sp etp2", "gradients are not summed", mix.PUBLISHED, {"c_fc.auxiliaries.0"}),
        ("tp2 sp etp2", "gradients are not summed", mix.OUTSIDE, {"c_proj.central"}),
        ("tp2 sp", "losses of each rank", mix.DENSE, {"router.weight", "z_loss", "input"}),
        ("cp2", "losses of each rank", mix.DENSE, {"router.weight", "balance_loss", "input"}),
    ],
)
def test_the_comparison_sees_what_is_wrong(
    run_ranks: Any, layout: str, break_it: str, site: Any, wrong: set[str]
) -> None:
    world, parallel = LAYOUTS[layout]
    case = Case(site, SWITCH, break_it=break_it)
    found = worst(run_ranks(world)(compare, parallel, {"broken": case}), "broken")
    seen = {what.removeprefix(f"{mix.NAME}.") for what, error in found.items() if error > 1e-3}
    assert wrong <= seen, found
    assert len(seen) < len(found)


DROPPING = {
    "top-1": Case(router={"capacity_factor": 0.6}),
    "top-2": Case(mix.DENSE, {"top_k": 2, "capacity_factor": 0.8}),
    "top-2 gathered": Case(mix.ACROSS, {"top_k": 2, "capacity_factor": 0.8}, "allgather"),
    "input": Case(mix.ASYMMETRIC, {"capacity_factor": 0.6, **INPUT}, "allgather"),
}


@pytest.mark.parametrize("layout", ["one rank", "ep2"])
def test_full_experts_drop_the_same_tokens(run_ranks: Any, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    outcomes = run_ranks(world)(compare, parallel, DROPPING)
    for name, case in DROPPING.items():
        dropped = [float(told["dropped"]) for told in mix.expect(case, 2).statistics]
        assert min(dropped) > 0
        assert max(worst(outcomes, name).values()) < 1e-6
        assert worst(outcomes, name)["output"] < 1e-12


REFUSED = {
    "capacity under sp": (
        ParallelConfig(tensor=2, sequence=True), {"capacity_factor": 1.5}, "capacity_factor",
    ),
    "capacity under cp": (
        ParallelConfig(context=2), {"eval_capacity_factor": 1.5}, "eval_capacity_factor",
    ),
    "tp without sp": (ParallelConfig(tensor=2), {}, "parallel.sequence=true"),
    "etp without tp": (ParallelConfig(expert_tensor=2), {}, "neither 1 nor parallel.tensor=1"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_wrong_is_refused(run_ranks: Any, what: str) -> None:
    parallel, router, text = REFUSED[what]
    for message in run_ranks(2)(refusal, parallel, Case(router=router)):
        assert text in message
        assert mix.NAME in message


def refusal(world: World, parallel: ParallelConfig, case: Case) -> str:
    with megatron_grid(world, parallel):
        try:
            mix.engine_mixture(case, parallel)
        except ParallelError as error:
            return str(error)
    return ""


def test_evaluation_counts_and_trains_nothing(run_ranks: Any) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, expert_tensor=2)
    assert run_ranks(2)(evaluate, parallel, Case(router=TOP_2)) == [True, True]


def evaluate(world: World, parallel: ParallelConfig, case: Case) -> bool:
    x = mix.tokens_of(0)[0]
    with megatron_grid(world, parallel), torch.no_grad():
        layer = mix.engine_mixture(case, parallel).eval()
        y, _ = layer(mix.mine(x, parallel))
        wanted = mix.local_mixture(case).eval()(x)[0]
        return torch.allclose(y, mix.mine(wanted, parallel), rtol=1e-12, atol=1e-12)


def test_plans_follow_shapes_alone(run_ranks: Any) -> None:
    """Half of 16 tokens, two choices, and as many rows again from the other rank's tokens."""
    parallel = ParallelConfig(tensor=2, sequence=True, expert_tensor=2)
    one_sided = Case(router={"top_k": 2} | BALANCED, favourite=0)
    for rows in run_ranks(2)(planned_rows, parallel, [Case(router=TOP_2), one_sided]):
        assert rows == [32] * 4
    parallel = ParallelConfig(tensor=2, sequence=True, expert=2)
    for rows in run_ranks(2)(planned_rows, parallel, [one_sided]):
        assert rows == [16] * 2


def planned_rows(world: World, parallel: ParallelConfig, cases: list[Case]) -> list[int]:
    seen: list[int] = []
    with megatron_grid(world, parallel), torch.no_grad():
        for case in cases:
            layer = mix.engine_mixture(case, parallel)
            for matrices in (layer.experts.c_fc, layer.experts.c_proj):
                matrices.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
            layer(mix.mine(mix.tokens_of(0)[0], parallel))
    return seen


def test_noise_is_that_of_the_local_router(run_ranks: Any) -> None:
    """With one sample, whose tokens have the same order in both layouts of hidden states."""
    assert run_ranks(1)(jittered, Case(router={"jitter": 0.3})) == [(True, True)]


def jittered(world: World, case: Case) -> tuple[bool, bool]:
    x = mix.tokens_of(0)[0][:1]
    with megatron_grid(world, ParallelConfig()):
        layer, local = mix.engine_mixture(case, ParallelConfig()), mix.local_mixture(case)
        torch.manual_seed(1)
        y, _ = layer(x.transpose(0, 1).contiguous())
        torch.manual_seed(1)
        alike = torch.allclose(y.transpose(0, 1), local(x)[0], rtol=1e-12, atol=1e-12)
        return alike, not torch.allclose(local(x)[0], local.eval()(x)[0], atol=1e-3)


def test_bf16_rounds_as_the_local_mixture(run_ranks: Any) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, expert_tensor=2)
    for y_error, gradient_error, kept in run_ranks(2)(in_bf16, parallel, Case(router=MPOE)):
        assert kept
        assert 1e-4 < y_error < 3e-2
        assert 1e-4 < gradient_error < 3e-2


def in_bf16(world: World, parallel: ParallelConfig, case: Case) -> tuple[float, float, bool]:
    """Differences in the norm: choices of single tokens may tip over, these do not."""
    x, upstream = mix.tokens_of(0)
    expected = mix.expect(case, 1)
    with megatron_grid(world, parallel):
        layer = mix.engine_mixture(case, parallel).bfloat16()
        given = mix.mine(x, parallel).bfloat16().requires_grad_()
        y, _ = layer(given)
        (y.double() * mix.mine(upstream, parallel)).sum().backward()
        wanted = mix.mine(expected.outputs[0], parallel)
        weight = layer.experts.c_fc.central
        part = mix.placement_part(weight, expected.gradients)
        kept = layer.router.balance.dtype == torch.float32
        kept = kept and y.dtype == weight.grad.dtype == torch.bfloat16
        return relative(y, wanted), relative(weight.grad, part), kept


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())
