"""Plans: FLOPs as counted by torch, the choice between kinds, the printed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_cases import SPECS, SPECS_AND_FORCES, make_plan, random_cores, random_tensor, specs
from torch.utils.flop_counter import FlopCounterMode

from mpotrain.errors import SpecError
from mpotrain.tensor.contract import linear
from mpotrain.tensor.plan import PROFILES, dense_cost, plan_contraction
from mpotrain.tensor.spec import mpo_spec, ttm_spec
from mpotrain.tensor.tree import Merge, merge_flops, merge_order, merge_shape

CPU, H200 = PROFILES["cpu"], PROFILES["h200"]
MPO5 = mpo_spec(768, 3072, (3, 4, 4, 4, 4), (4, 4, 8, 6, 4))


def counted(spec, plan, tokens):
    cores = random_cores(spec, dtype=torch.float32)
    x = random_tensor(tokens, spec.in_features, dtype=torch.float32).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = linear(x, cores, spec, plan)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(("spec", "force"), SPECS_AND_FORCES.values(), ids=SPECS_AND_FORCES)
def test_flops_are_those_that_torch_counts(spec, force):
    plan = make_plan(spec, force, tokens=7)
    assert (plan.forward_flops, plan.backward_flops) == counted(spec, plan, 7)


@settings(max_examples=25, deadline=None)
@given(spec=specs(), tokens=st.integers(1, 9), choice=st.sampled_from([None, "chain"]))
def test_flops_of_any_spec(spec, tokens, choice):
    plan = plan_contraction(spec, tokens, "bf16", CPU, force=choice)
    assert (plan.forward_flops, plan.backward_flops) == counted(spec, plan, tokens)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_totals_are_sums_of_the_operations(spec):
    plan = plan_contraction(spec, 100, "bf16", H200)
    assert plan.forward_flops + plan.backward_flops == sum(op.flops for op in plan.operations)
    assert plan.bytes == sum(op.bytes for op in plan.operations)
    assert plan.seconds == pytest.approx(sum(op.seconds for op in plan.operations))
    dense = dense_cost(spec.in_features, spec.out_features, 100, "bf16", H200)
    assert plan.ratio == pytest.approx(plan.seconds / dense.seconds)
    assert dense.forward_flops == 2 * 100 * spec.dense_parameters
    assert dense.backward_flops == 2 * dense.forward_flops


def cheapest_by_brute_force(spec, first, last):
    if first == last:
        return 0
    return min(
        cheapest_by_brute_force(spec, first, split)
        + cheapest_by_brute_force(spec, split + 1, last)
        + 2 * math.prod(merge_shape(spec, Merge(first, split, last)))
        for split in range(first, last)
    )


@settings(max_examples=40, deadline=None)
@given(specs(most_cores=6))
def test_merge_order_is_optimal_and_well_formed(spec):
    last = spec.num_cores - 1
    merges = merge_order(spec, 0, last)
    assert merge_flops(spec, merges) == cheapest_by_brute_force(spec, 0, last)
    known = {(k, k) for k in range(spec.num_cores)}
    for merge in merges:
        known.remove(merge.left)
        known.remove(merge.right)
        known.add(merge.result)
    assert known == {(0, last)}


def test_rebuild_overhead_of_published_shapes():
    """mu, the FLOPs of a rebuild in units of one token's dense product."""
    for spec, mu in ((MPO5, 577.2), (ttm_spec(768, 3072, 16), None)):
        flops = merge_flops(spec, merge_order(spec, 0, spec.num_cores - 1))
        value = flops / (2 * spec.dense_parameters)
        assert value == pytest.approx(mu, abs=0.05) if mu else value > 16


def test_training_materialises_and_decoding_groups():
    for spec in (ttm_spec(768, 3072, 64), ttm_spec(1024, 4096, 72), MPO5):
        for profile, tokens in itertools.product(("cpu", "h200", "h100", "a100"), (4096, 16384)):
            plan = plan_contraction(spec, tokens, "bf16", PROFILES[profile])
            assert plan.kind == "materialise"
            assert plan.ratio > 1
    small = plan_contraction(ttm_spec(768, 3072, 64), 1, "bf16", H200)
    assert small.kind in ("chain", "groups")
    flat = mpo_spec(4096, 16384, (64, 64), (128, 128), cap=4)
    assert plan_contraction(flat, 16384, "bf16", H200).kind == "chain"


def test_least_time_of_all_candidates_wins():
    spec = mpo_spec(48, 60, (4, 3, 4), (3, 4, 5), cap=8)
    forces = ["materialise", "chain:lr", "chain:rl"]
    forces += [f"groups:{sizes}:{d}" for sizes in ("1+2", "2+1") for d in ("lr", "rl")]
    for tokens in (1, 16, 256, 4096):
        times = [plan_contraction(spec, tokens, "fp32", CPU, force=f).seconds for f in forces]
        assert plan_contraction(spec, tokens, "fp32", CPU).seconds == min(times)


def test_narrow_slices_are_folded_and_wide_ones_batched():
    spec = mpo_spec(4096, 4096, (4, 1024), (1024, 4), cap=4)
    wide, narrow = plan_contraction(spec, 64, "fp32", CPU, force="chain:lr").steps
    assert (wide.width, wide.batched) == (1024, True)
    assert (narrow.width, narrow.batched) == (1, False)
    thin = mpo_spec(4096, 4096, (1024, 4), (4, 1024), cap=4)
    first, _ = plan_contraction(thin, 64, "fp32", CPU, force="chain:lr").steps
    assert (first.width, first.batched) == (4, False)
    slices = PROFILES["cpu"].batched_efficiency
    assert slices(12) < 0.1 < 0.5 < slices(32) < 0.99 < slices(1024)


def test_copies_are_predicted_only_where_axes_move():
    """Two groups from the right, both batched or flat: no token-sized data is reordered."""
    spec = mpo_spec(4096, 16384, (64, 64), (128, 128), cap=4)
    plan = plan_contraction(spec, 256, "bf16", H200, force="chain:rl")
    assert [step.batched for step in plan.steps] == [False, True]
    copies = [op.name for op in plan.operations if op.phase == "forward" and op.flops == 0]
    assert copies == ["reorder core 2", "reorder core 1"]


def test_keeping_the_weight_trades_memory_for_work():
    rebuilt = plan_contraction(MPO5, 4096, "bf16", H200)
    kept = plan_contraction(MPO5, 4096, "bf16", H200, keep_weight=True)
    assert rebuilt.saved_bytes == 0
    assert kept.saved_bytes == 2 * 768 * 3072
    assert kept.backward_flops < rebuilt.backward_flops
    assert kept.seconds < rebuilt.seconds
    chain = plan_contraction(MPO5, 4, "bf16", H200, force="chain", keep_weight=True)
    assert (chain.keep_weight, chain.saved_bytes) == (False, 0)


def test_transient_limit_rules_out_large_chains():
    flat = mpo_spec(4096, 16384, (64, 64), (128, 128), cap=4)
    free = plan_contraction(flat, 16384, "bf16", H200)
    assert free.kind == "chain"
    tight = plan_contraction(flat, 16384, "bf16", H200, transient_limit=free.transient_bytes - 1)
    assert tight.kind == "materialise"


def test_plans_are_cached_values():
    again = plan_contraction(MPO5, 512, "bf16", H200)
    assert plan_contraction(MPO5, 512, "bf16", H200) is again
    plan_contraction.cache_clear()
    assert plan_contraction(MPO5, 512, "bf16", H200) == again


def test_many_cores_are_planned_in_reasonable_time():
    spec = mpo_spec(2**14, 2**14, (2,) * 14, (2,) * 14, cap=4)
    plan = plan_contraction(spec, 4096, "bf16", H200)
    assert plan.groups[0][0] == 0
    assert plan.groups[-1][1] == 13


@pytest.mark.parametrize(
    "force", ["", "magic", "groups:1+1:lr", "groups:2+2", "materialise:lr", "chain:up", "groups"]
)
def test_impossible_plans_are_refused(force):
    spec = SPECS["2 cores"]
    with pytest.raises(SpecError, match="plan"):
        plan_contraction(spec, 4, "fp32", CPU, force=force)


def test_unknown_dtype_is_refused():
    with pytest.raises(SpecError, match="fp8"):
        plan_contraction(SPECS["2 cores"], 4, "fp8", CPU)  # type: ignore[arg-type]


def test_printed_form():
    plan = plan_contraction(ttm_spec(768, 3072, 16), 4096, "bf16", H200, force="groups:2+3:rl")
    assert "\n" not in plan.summary
    assert "768 x 3072, 4096 tokens, bf16 on h200: groups 2+3 rl" in plan.summary
    lines = plan.describe().splitlines()
    assert lines[0] == plan.summary
    assert lines[1].split() == ["phase", "operation", "m", "x", "k", "x", "n", "MFLOP", "MB", "us"]
    assert len(lines) == len(plan.operations) + 3
    assert "x with cores 3-5" in plan.describe()
    assert lines[-1].startswith("total")
    kept = plan_contraction(MPO5, 4096, "bf16", H200, keep_weight=True)
    assert "W kept" in kept.summary
    assert plan.merges[0] == (Merge(0, 0, 1),)
