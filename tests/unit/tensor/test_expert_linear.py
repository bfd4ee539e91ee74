"""Expert layers against a loop over rebuilt experts, for every plan and spread of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_cases import random_tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mpotrain.tensor import expert_grouped
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.expert_grouped import _accumulate
from mpotrain.tensor.expert_linear import expert_linear
from mpotrain.tensor.expert_plan import plan_experts
from mpotrain.tensor.experts import asymmetric_spec, auxiliary_shapes
from mpotrain.tensor.plan import PROFILES
from mpotrain.tensor.spec import MPOSpec, exact_bonds, mpo_spec

CPU = PROFILES["cpu"]
SPECS = {
    "asymmetric, full": asymmetric_spec(12, 20, 4, 5),
    "asymmetric, half": asymmetric_spec(12, 20, 4, 4, 2, 3),
    "3 cores": mpo_spec(24, 30, (2, 3, 4), (5, 3, 2)),
    "4 cores": MPOSpec((2, 2, 2, 3), (2, 3, 2, 2), (4, 5, 3)),
    "5 cores, truncated": mpo_spec(48, 48, (3, 2, 2, 2, 2), (2, 3, 2, 2, 2), cap=6),
    "7 cores, 3 on a side": MPOSpec(
        (2, 1, 2, 2, 1, 2, 2), (1, 2, 2, 1, 2, 2, 1), (2, 3, 4, 5, 4, 2)
    ),
    "bonds of one": mpo_spec(8, 8, (2, 2, 2), (2, 2, 2), cap=1),
}
PLANS = {
    "grouped, left first": {"force": "grouped", "first": "left", "chunk": 1},
    "grouped, right first": {"force": "grouped", "first": "right", "chunk": 1},
    "grouped, left first, by 3": {"force": "grouped", "first": "left", "chunk": 3},
    "grouped, right first, by 2": {"force": "grouped", "first": "right", "chunk": 2},
    "factored": {"force": "factored", "keep_state": True},
    "factored, nothing kept": {"force": "factored", "keep_state": False},
}
COUNTS = {
    "uneven": (2, 1, 3, 1),
    "empty experts": (0, 4, 0, 2),
    "all to one": (0, 0, 5, 0),
    "no rows": (0, 0, 0, 0),
}


def make_plan(spec, num_experts, name, tokens=7, dtype="fp32", **options):
    choice = dict(PLANS[name])
    plan = plan_experts(spec, num_experts, tokens, dtype, CPU, choice.pop("force"), **options)
    return replace(plan, **choice)


def random_case(spec, counts, dtype=torch.float64, grad=True):
    """Return x, central tensor, auxiliaries, bias and dy."""
    experts, rows = len(counts), sum(counts)
    shapes = [
        (rows, spec.in_features),
        spec.core_shapes[spec.central_index],
        *[(experts, *shape) for shape in auxiliary_shapes(spec)],
        (experts, spec.out_features),
    ]
    made = [
        random_tensor(*shape, seed=seed, dtype=dtype).requires_grad_(grad)
        for seed, shape in enumerate(shapes)
    ]
    x, central, *auxiliaries, bias = made
    return x, central, auxiliaries, bias, random_tensor(rows, spec.out_features, seed=99).to(dtype)


def reference(x, central, auxiliaries, bias, spec, counts):
    c, parts = spec.central_index, []
    for expert, rows in enumerate(x.split(list(counts))):
        own = [auxiliary[expert] for auxiliary in auxiliaries]
        parts.append(rows @ rebuild([*own[:c], central, *own[c:]], spec) + bias[expert])
    return torch.cat(parts)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_output_and_all_gradients_equal_those_of_rebuilt_experts(spec, name, counts):
    x, central, auxiliaries, bias, dy = random_case(spec, counts)
    plan = make_plan(spec, len(counts), name)
    inputs = [x, central, *auxiliaries, bias]
    y = expert_linear(x, central, auxiliaries, spec, counts, plan, bias)
    expected = reference(x, central, auxiliaries, bias, spec, counts)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(y, inputs, dy)
    wanted = torch.autograd.grad(expected, inputs, dy, allow_unused=True)
    for gradient, target, tensor in zip(found, wanted, inputs, strict=True):
        target = torch.zeros_like(tensor) if target is None else target
        torch.testing.assert_close(gradient, target, rtol=1e-11, atol=1e-11)


@st.composite
def cases(draw):
    n = draw(st.integers(3, 6))
    i = tuple(draw(st.integers(1, 3)) for _ in range(n))
    j = tuple(draw(st.integers(1, 3)) for _ in range(n))
    bonds = tuple(draw(st.integers(1, min(most, 5))) for most in exact_bonds(i, j))
    counts = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    return MPOSpec(i, j, bonds), counts, draw(st.sampled_from(sorted(PLANS)))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_operator_and_spread(case):
    spec, counts, name = case
    x, central, auxiliaries, bias, dy = random_case(spec, counts)
    plan = make_plan(spec, len(counts), name)
    inputs = [x, central, *auxiliaries]
    y = expert_linear(x, central, auxiliaries, spec, counts, plan)
    expected = reference(x, central, auxiliaries, torch.zeros_like(bias), spec, counts)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(y, inputs, dy)
    wanted = torch.autograd.grad(expected, inputs, dy, materialize_grads=True)
    for gradient, target in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, target, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PLANS)
def test_gradients_agree_with_finite_differences(name):
    spec, counts = MPOSpec((2, 2, 2), (1, 2, 2), (2, 3)), (2, 0, 1)
    x, central, auxiliaries, bias, _ = random_case(spec, counts)
    plan = make_plan(spec, 3, name)

    def run(x, central, bias, *auxiliaries):
        return expert_linear(x, central, auxiliaries, spec, counts, plan, bias)

    assert torch.autograd.gradcheck(run, (x, central, bias, *auxiliaries))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("frozen", ["x", "central", "auxiliaries", "all but the bias"])
def test_frozen_tensors_do_not_disturb_the_other_gradients(name, frozen):
    spec, counts = SPECS["5 cores, truncated"], COUNTS["empty experts"]
    x, central, auxiliaries, bias, dy = random_case(spec, counts)
    groups = {"x": [x], "central": [central], "auxiliaries": auxiliaries}
    groups["all but the bias"] = [x, central, *auxiliaries]
    plan = make_plan(spec, len(counts), name)
    inputs = [x, central, *auxiliaries, bias]

    def gradients():
        free = [tensor for tensor in inputs if tensor.requires_grad]
        y = expert_linear(x, central, auxiliaries, spec, counts, plan, bias)
        return dict(zip(map(id, free), torch.autograd.grad(y, free, dy), strict=True))

    everything = gradients()
    for tensor in groups[frozen]:
        tensor.requires_grad_(False)
    for key, gradient in gradients().items():
        torch.testing.assert_close(gradient, everything[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", PLANS)
def test_forward_keeps_what_the_plan_says_and_no_rebuilt_expert(name):
    spec, counts = SPECS["asymmetric, full"], (3, 4)
    x, central, auxiliaries, bias, _ = random_case(spec, counts, torch.float32)
    plan = make_plan(spec, 2, name, keep_state=PLANS[name].get("keep_state", True))
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        expert_linear(x, central, auxiliaries, spec, counts, plan, bias)
    for tensor in (x, central, *auxiliaries):
        kept.pop(tensor.untyped_storage().data_ptr())
    assert sum(kept.values()) == plan.saved_bytes
    assert (plan.saved_bytes > 0) == (name == "factored")


@pytest.mark.parametrize(
    ("kind", "keep"), [("grouped", True), ("factored", True), ("factored", False)]
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_flops_are_those_of_the_plan(spec, kind, keep):
    counts = (3, 3, 3, 3)
    x, central, auxiliaries, _, dy = random_case(spec, counts, torch.float32)
    plan = plan_experts(spec, 4, 12, "fp32", CPU, kind, keep_state=keep)
    counter = FlopCounterMode(display=False)
    for chunk in (1, 3):
        with counter:
            run = replace(plan, chunk=chunk)
            y = expert_linear(x, central, auxiliaries, spec, counts, run)
        assert counter.get_total_flops() == plan.forward_flops
        with counter:
            torch.autograd.grad(y, [x, central, *auxiliaries], dy)
        assert counter.get_total_flops() == plan.backward_flops


def test_both_orders_of_rebuilding_are_planned():
    firsts = {plan_experts(spec, 4, 12, "fp32", CPU, "grouped").first for spec in SPECS.values()}
    assert firsts == {"left", "right"}


@pytest.mark.parametrize("name", PLANS)
def test_works_under_checkpointing_twice_and_without_gradients(name):
    spec, counts = SPECS["4 cores"], COUNTS["uneven"]
    x, central, auxiliaries, bias, dy = random_case(spec, counts)
    plan = make_plan(spec, len(counts), name)
    inputs = [x, central, *auxiliaries, bias]

    def run(x):
        return expert_linear(x, central, auxiliaries, spec, counts, plan, bias)

    expected = torch.autograd.grad(run(x), inputs, dy)
    y = checkpoint(run, x, use_reentrant=False)
    for _ in range(2):
        for gradient, target in zip(
            torch.autograd.grad(y, inputs, dy, retain_graph=True), expected, strict=True
        ):
            torch.testing.assert_close(gradient, target, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(run(x), y.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", PLANS)
def test_strided_inputs_and_gradients(name):
    spec, counts = SPECS["3 cores"], COUNTS["uneven"]
    x, central, auxiliaries, _, dy = random_case(spec, counts, grad=False)
    plan = make_plan(spec, len(counts), name)
    strided = x.t().contiguous().t().requires_grad_()
    plain = x.clone().requires_grad_()
    assert not strided.is_contiguous()
    for tensor, gradient in ((strided, dy.t().contiguous().t()), (plain, dy)):
        y = expert_linear(tensor, central, auxiliaries, spec, counts, plan)
        y.backward(gradient)
    torch.testing.assert_close(strided.grad, plain.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("core_dtype", [torch.float32, torch.bfloat16])
def test_bf16_rows_lose_no_more_than_their_own_rounding(name, core_dtype):
    spec, counts = asymmetric_spec(64, 96, 8, 8), (40, 0, 24)
    x, central, auxiliaries, bias, dy = random_case(spec, counts, core_dtype)
    x = x.detach().bfloat16().requires_grad_()
    plan = make_plan(spec, 3, name, 64, "bf16")
    inputs = [x, central, *auxiliaries, bias]
    y = expert_linear(x, central, auxiliaries, spec, counts, plan, bias)
    found = torch.autograd.grad(y, inputs, dy.bfloat16())
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in found] == [t.dtype for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = reference(exact[0], exact[1], exact[2:-1], exact[-1], spec, counts)
    wanted = torch.autograd.grad(expected, exact, dy.bfloat16().double())
    for got, target in zip((y, *found), (expected, *wanted), strict=True):
        assert relative_error(got, target) < 2**-7


def relative_error(got, target):
    got, target = got.detach().double(), target.detach()
    return float((got - target).norm() / target.norm())


def test_merging_in_fp32_is_more_exact_than_in_the_compute_dtype():
    spec, counts = mpo_spec(64, 96, (4, 2, 2, 2, 2), (2, 2, 4, 2, 3)), (32, 32)
    x, central, auxiliaries, bias, dy = random_case(spec, counts, torch.float32)
    x = x.detach().bfloat16().requires_grad_()
    errors = {}
    with torch.no_grad():
        exact = [t.double() for t in (x, central, *auxiliaries, bias)]
        target = reference(exact[0], exact[1], exact[2:-1], 0 * exact[-1], spec, counts)
    for precision in ("fp32", "compute"):
        plan = plan_experts(spec, 2, 64, "bf16", CPU, "grouped", merge_precision=precision)
        y = expert_linear(x, central, auxiliaries, spec, counts, plan)
        errors[precision] = relative_error(y, target)
        gradients = torch.autograd.grad(y, [x, central, *auxiliaries], dy.bfloat16())
        assert all(g.isfinite().all() for g in gradients)
        assert [g.dtype for g in gradients[1:]] == [torch.float32] * 5
    assert errors["fp32"] < 0.7 * errors["compute"] < 2**-6


def test_the_gradient_of_the_shared_central_tensor_sums_over_many_experts_in_fp32():
    spec, experts = asymmetric_spec(8, 8, 2, 2), 512
    counts = (1,) * experts
    x = torch.ones(experts, 8, dtype=torch.bfloat16)
    central = torch.ones(spec.core_shapes[1], dtype=torch.bfloat16, requires_grad=True)
    auxiliaries = [
        torch.ones(experts, *shape, dtype=torch.bfloat16) for shape in auxiliary_shapes(spec)
    ]
    dy = torch.ones(experts, 8, dtype=torch.bfloat16)
    for precision in ("fp32", "compute"):
        plan = plan_experts(
            spec, experts, experts, "bf16", CPU, "grouped", merge_precision=precision
        )
        y = expert_linear(x, central, auxiliaries, spec, counts, replace(plan, chunk=1))
        (gradient,) = torch.autograd.grad(y, [central], dy)
        # Each expert adds 2 x 2 = 4; in bf16 the sum would stand still at 1024.
        assert torch.equal(gradient, torch.full_like(gradient, 4.0 * experts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (1, 1, 1)}, "do not spread"),
        ({"counts": (3, 1)}, "do not spread"),
        ({"counts": (-1, 2, 2)}, "do not spread"),
        ({"x": torch.zeros(4, 11)}, "x is"),
        ({"x": torch.zeros(2, 2, 12)}, "x is"),
        ({"x": torch.zeros(4, 12, dtype=torch.int64)}, "floating"),
        ({"central": torch.zeros(4, 3, 4, 4)}, "central tensor"),
        ({"auxiliaries": [torch.zeros(3, 1, 4, 1, 4)]}, "auxiliaries"),
        (
            {"auxiliaries": [torch.zeros(3, 1, 4, 1, 4), torch.zeros(2, 5, 1, 5, 1)]},
            "auxiliaries",
        ),
        ({"bias": torch.zeros(20)}, "bias"),
        ({"spec": SPECS["3 cores"]}, "plan was made"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    spec, counts = SPECS["asymmetric, full"], (1, 0, 3)
    x, central, auxiliaries, bias, _ = random_case(spec, counts, torch.float32)
    arguments = {
        "x": x,
        "central": central,
        "auxiliaries": auxiliaries,
        "spec": spec,
        "counts": counts,
        "plan": plan_experts(spec, 3, 4, "fp32", CPU),
        "bias": bias,
    }
    expert_linear(**arguments)
    with pytest.raises(ValueError, match=message):
        expert_linear(**(arguments | change))


def test_rebuilding_never_holds_more_experts_than_the_chunk(monkeypatch):
    spec, counts = SPECS["3 cores"], (1, 2, 0, 1, 1)
    x, central, auxiliaries, bias, dy = random_case(spec, counts)
    seen = []
    whole = expert_grouped._Rebuilder.weight

    def weight(self, half, experts, dtype):
        matrix = whole(self, half, experts, dtype)
        seen.append(len(matrix))
        return matrix

    monkeypatch.setattr(expert_grouped._Rebuilder, "weight", weight)
    plan = replace(plan_experts(spec, 5, 5, "fp32", CPU, "grouped"), chunk=2)
    expert_linear(x, central, auxiliaries, spec, counts, plan, bias).backward(dy)
    assert seen == [2, 2, 2, 2]


def test_sums_of_two_dtypes_are_plain_sums() -> None:
    total = torch.randn(3, 70_001)
    part = torch.randn(3, 70_001).bfloat16()
    wanted = total + part
    _accumulate(total, part)
    assert torch.equal(total, wanted)
