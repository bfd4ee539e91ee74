"""Plans of experts: which form is chosen, what it is predicted to cost, and how it prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mpotrain.errors import SpecError
from mpotrain.tensor.cost import dense_cost
from mpotrain.tensor.expert_plan import plan_experts
from mpotrain.tensor.experts import ExpertShape, asymmetric_spec, num_expert_parameters
from mpotrain.tensor.plan import PROFILES
from mpotrain.tensor.spec import mpo_spec

CPU = PROFILES["cpu"]
FULL = asymmetric_spec(768, 3072, 64, 64)
HALF = asymmetric_spec(768, 3072, 64, 64, 32, 32)
PUBLISHED = mpo_spec(768, 3072, (3, 4, 4, 4, 4), (4, 4, 8, 6, 4))


@pytest.mark.parametrize("num_experts", [8, 32, 128])
def test_asymmetric_experts_are_factored_and_published_ones_rebuilt(num_experts):
    for profile in (CPU, PROFILES["h200-tf32"]):
        for spec, kind in ((FULL, "factored"), (HALF, "factored"), (PUBLISHED, "grouped")):
            assert plan_experts(spec, num_experts, 4096, "bf16", profile).kind == kind


@pytest.mark.parametrize("spec", [FULL, HALF, PUBLISHED])
def test_factored_flops_follow_the_closed_form(spec):
    s = ExpertShape.of(spec)
    plan = plan_experts(spec, 8, 4096, "bf16", CPU, "factored")
    share = (
        s.left_bond / (s.central_out * s.right_out)
        + s.left_bond * s.right_bond / (s.left_in * s.right_out)
        + s.right_bond / (s.left_in * s.central_in)
    )
    sides = sum(op.flops for op in plan.operations if "core" in op.name and op.phase == "forward")
    dense = dense_cost(768, 3072, 4096, "bf16", CPU).forward_flops
    assert (plan.forward_flops - sides) / dense == pytest.approx(share, rel=1e-9)


def test_a_rebuild_costs_every_expert_the_same_and_a_factored_layer_nothing_more():
    flops = {
        kind: [plan_experts(FULL, e, 4096, "bf16", CPU, kind).forward_flops for e in (8, 16, 32)]
        for kind in ("grouped", "factored")
    }
    first, second, third = flops["grouped"]
    assert third - second == 2 * (second - first) > 0
    assert len(set(flops["factored"])) == 1


def test_keeping_the_state_trades_memory_for_flops():
    kept = plan_experts(HALF, 8, 4096, "bf16", CPU, "factored")
    again = plan_experts(HALF, 8, 4096, "bf16", CPU, "factored", keep_state=False)
    assert kept.saved_bytes == 4096 * 48 * 32 * 2
    assert again.saved_bytes == 0
    assert again.backward_flops - kept.backward_flops == 2 * 4096 * (12 * 32) * (48 * 32)
    assert again.seconds > kept.seconds


def test_experts_without_rows_are_not_rebuilt():
    few = plan_experts(FULL, 128, 4, "bf16", CPU, "grouped")
    many = plan_experts(FULL, 4, 4, "bf16", CPU, "grouped")
    assert few.forward_flops == many.forward_flops


def test_chunks_stay_below_the_memory_limit_and_save_launches_on_a_gpu():
    gpu = plan_experts(PUBLISHED, 128, 65536, "bf16", PROFILES["h200-tf32"], "grouped")
    cpu = plan_experts(PUBLISHED, 128, 65536, "bf16", CPU, "grouped")
    assert cpu.chunk == 1
    assert gpu.chunk > 1
    assert gpu.chunk * 768 * 3072 * 6 <= 256 << 20
    assert cpu.transient_bytes < gpu.transient_bytes


def test_merging_in_the_compute_dtype_is_predicted_faster_in_bf16_alone():
    def seconds(dtype, precision):
        plan = plan_experts(PUBLISHED, 8, 4096, dtype, CPU, "grouped", merge_precision=precision)
        return plan.seconds

    assert seconds("bf16", "compute") < 0.5 * seconds("bf16", "fp32")
    assert seconds("fp32", "compute") == seconds("fp32", "fp32")


def test_states_many_times_wider_than_the_layer_are_never_chosen_unasked():
    # 128 experts with one row each: rebuilding is predicted far slower, but factoring this shape
    # would need states 80 times as wide as x and y.
    free = plan_experts(PUBLISHED, 128, 128, "bf16", CPU)
    forced = plan_experts(PUBLISHED, 128, 128, "bf16", CPU, "factored")
    assert forced.seconds < free.seconds
    assert free.kind == "grouped"


def test_plans_are_cached_and_print_their_operations():
    plan = plan_experts(FULL, 8, 4096, "bf16", CPU)
    assert plan is plan_experts(FULL, 8, 4096, "bf16", CPU)
    text = plan.describe()
    assert text.startswith(plan.summary)
    assert "8 experts 768 x 3072, 4096 rows, bf16 on cpu: factored" in plan.summary
    for name in ("rows with central", "gradient of left side", "total"):
        assert name in text
    grouped = plan_experts(PUBLISHED, 8, 4096, "bf16", CPU, merge_precision="compute")
    assert "merged in bf16" in grouped.summary
    assert "merge core 1 with core 2" in grouped.describe()
    assert sum(op.seconds for op in plan.operations) == pytest.approx(plan.seconds)
    assert plan.ratio == pytest.approx(plan.seconds / plan.dense_seconds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": mpo_spec(24, 24, (4, 6), (4, 6))}, "at least 3 cores"),
        ({"spec": mpo_spec(22, 24, (2, 3, 4), (4, 3, 2), cap=4)}, "padding"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"force": "chain"}, "unknown"),
        ({"num_experts": 0}, "at least 1"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    arguments = {"spec": FULL, "num_experts": 8, "tokens": 4096, "dtype": "bf16", "profile": CPU}
    with pytest.raises(SpecError, match=message):
        plan_experts(**(arguments | change))


def test_num_parameters_of_the_benchmarked_shapes():
    assert num_expert_parameters(FULL, 32) == 768 * 3072 + 32 * 2 * 64 * 64


def test_planning_needs_no_torch():
    code = "import sys, mpotrain.tensor.expert_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
