"""Contractions against brute force, autograd and finite differences, for every plan."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_cases import (
    FORCES,
    SPECS,
    SPECS_AND_FORCES,
    make_plan,
    matrix_by_definition,
    random_cores,
    random_tensor,
    specs,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mpotrain.tensor.contract import linear, materialise, rebuild
from mpotrain.tensor.materialise import project_weight_gradient
from mpotrain.tensor.plan import PROFILES, plan_contraction
from mpotrain.tensor.spec import mpo_spec

CPU = PROFILES["cpu"]


def reference(x, cores, spec, bias):
    y = x @ rebuild(cores, spec)
    return y if bias is None else y + bias


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_rebuild_is_the_definition(spec):
    cores = random_cores(spec)
    expected = matrix_by_definition(cores, spec)
    torch.testing.assert_close(rebuild(cores, spec), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(materialise(cores, spec), expected, rtol=1e-12, atol=1e-12)


def test_wrong_permutation_is_noticed():
    """Pairing the modes in another order still has the right shape: values must decide."""
    spec = mpo_spec(6, 6, (2, 3), (3, 2))
    cores = random_cores(spec)
    product = torch.tensordot(cores[0], cores[1], dims=1).detach()
    wrong = product.permute(0, 1, 2, 3, 4, 5).reshape(6, 6)
    assert (wrong - matrix_by_definition(cores, spec)).norm() > 0.1 * wrong.norm()


@pytest.mark.parametrize(("spec", "force"), SPECS_AND_FORCES.values(), ids=SPECS_AND_FORCES)
def test_values_and_gradients_equal_autograd(spec, force):
    plan = make_plan(spec, force)
    cores = random_cores(spec)
    bias = random_tensor(spec.out_features, seed=3).requires_grad_()
    x = random_tensor(2, 3, spec.in_features).requires_grad_()
    weight = random_tensor(2, 3, spec.out_features, seed=4)
    y = linear(x, cores, spec, plan, bias)
    expected = reference(x, cores, spec, bias)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    inputs = [x, bias, *cores]
    ours = torch.autograd.grad((y * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("force", ["chain:lr", "chain:rl", "groups:lr", "groups:rl"])
@pytest.mark.parametrize("name", ["3 cores", "5 cores, padded", "redundant bonds", "tt layout"])
def test_every_layout_of_the_steps(name, force):
    """Batched and folded steps in every combination compute the same with the same FLOPs."""
    spec = SPECS[name]
    plan = make_plan(spec, force)
    cores = random_cores(spec)
    x = random_tensor(6, spec.in_features).requires_grad_()
    expected = x @ rebuild(cores, spec)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *cores])
    for layout in itertools.product([False, True], repeat=len(plan.steps)):
        steps = [replace(s, batched=b) for s, b in zip(plan.steps, layout, strict=True)]
        variant = replace(plan, steps=tuple(steps))
        with FlopCounterMode(display=False) as counter:
            y = linear(x, cores, spec, variant)
            found = torch.autograd.grad(y.square().sum(), [x, *cores])
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert counter.get_total_flops() == plan.forward_flops + plan.backward_flops


@settings(max_examples=40, deadline=None)
@given(spec=specs(), data=st.data())
def test_any_spec_any_plan(spec, data):
    sizes = data.draw(st.lists(st.integers(1, spec.num_cores), min_size=1))
    total, kept = 0, []
    for size in sizes:
        if total + size <= spec.num_cores:
            kept.append(size)
            total += size
    kept += [1] * (spec.num_cores - total)
    direction = data.draw(st.sampled_from(["lr", "rl"]))
    force = f"groups:{'+'.join(map(str, kept))}:{direction}"
    if len(kept) == 1:
        force = "materialise"
    elif len(kept) == spec.num_cores:
        force = f"chain:{direction}"
    plan = plan_contraction(spec, 4, "fp32", CPU, force=force)
    cores = random_cores(spec, seed=data.draw(st.integers(0, 99)))
    x = random_tensor(4, spec.in_features).requires_grad_()
    y, expected = linear(x, cores, spec, plan), x @ rebuild(cores, spec)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    ours = torch.autograd.grad(y.square().sum(), [x, *cores])
    theirs = torch.autograd.grad(expected.square().sum(), [x, *cores])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("force", FORCES)
def test_finite_differences(force):
    spec = mpo_spec(7, 10, (2, 2, 2), (2, 3, 2), cap=3)
    plan = make_plan(spec, force)
    cores = random_cores(spec)
    x = random_tensor(3, 7).requires_grad_()
    bias = random_tensor(10, seed=5).requires_grad_()

    def f(x, bias, *cores):
        return linear(x, list(cores), spec, plan, bias)

    assert torch.autograd.gradcheck(f, (x, bias, *cores))


def test_finite_differences_of_materialise():
    spec = mpo_spec(7, 10, (2, 2, 2), (2, 3, 2), cap=3)
    cores = random_cores(spec)
    assert torch.autograd.gradcheck(lambda *c: materialise(list(c), spec), tuple(cores))


def saved_elements(run) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return saved


@pytest.mark.parametrize("force", FORCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_input_and_cores_alone(force, dtype):
    spec = mpo_spec(45, 70, (3, 2, 2, 2, 2), (2, 3, 2, 3, 2), cap=5)
    plan = make_plan(spec, force)
    cores = random_cores(spec, dtype=torch.float32)
    x = random_tensor(64, 45, dtype=dtype).requires_grad_()
    bias = torch.zeros(70, requires_grad=True)
    saved = saved_elements(lambda: linear(x, cores, spec, plan, bias))
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    expected = x.nbytes + sum(core.nbytes for core in cores)
    expected += spec.padded_in * spec.padded_out * dtype.itemsize if force == "keep" else 0
    assert num_bytes == expected
    reference_saved = saved_elements(lambda: reference(x.float(), cores, spec, bias))
    assert sum(tensor.untyped_storage().nbytes() for tensor in reference_saved) > expected


def test_materialise_saves_cores_alone():
    spec = SPECS["5 cores, padded"]
    cores = random_cores(spec)
    saved = saved_elements(lambda: materialise(cores, spec))
    assert [id(tensor) for tensor in saved] == [id(core) for core in cores]


@pytest.mark.parametrize("force", FORCES)
@pytest.mark.parametrize("core_dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision_is_as_good_as_dense_bf16(force, core_dtype):
    spec = mpo_spec(96, 120, (4, 6, 4), (4, 6, 5), cap=12)
    plan = make_plan(spec, force, tokens=256)
    cores = random_cores(spec, dtype=core_dtype)
    x = random_tensor(256, 96, dtype=torch.bfloat16).requires_grad_()
    weight = random_tensor(256, 120, dtype=torch.bfloat16)
    y = linear(x, cores, spec, plan)
    assert y.dtype == torch.bfloat16
    y.backward(weight)
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    exact_cores = [core.detach().double().requires_grad_() for core in cores]
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x @ rebuild(exact_cores, spec)
    exact.backward(weight.double())

    def error(a, b):
        return float((a.detach().double() - b).norm() / b.norm())

    limit = 0.004 if "materialise" in force or force == "keep" else 0.008
    assert error(y, exact.detach()) < limit
    assert error(x.grad, exact_x.grad) < limit
    for core, exact_core in zip(cores, exact_cores, strict=True):
        assert core.grad is not None
        assert core.grad.dtype == core_dtype
        assert error(core.grad, exact_core.grad) < limit


@pytest.mark.parametrize("force", FORCES)
def test_gradients_only_where_wanted(force):
    spec = SPECS["5 cores, padded"]
    plan = make_plan(spec, force)
    cores = random_cores(spec)
    x = random_tensor(4, spec.in_features)
    expected = torch.autograd.grad((x @ rebuild(cores, spec)).square().sum(), cores)
    for frozen in ([2], [0, 1, 3, 4], [0], [4]):
        some = [core.detach().requires_grad_(k not in frozen) for k, core in enumerate(cores)]
        linear(x, some, spec, plan).square().sum().backward()
        for k, core in enumerate(some):
            if k in frozen:
                assert core.grad is None
            else:
                torch.testing.assert_close(core.grad, expected[k], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("force", FORCES)
def test_frozen_cores_need_no_weight_gradient(force):
    """With every core frozen the layer is a constant matrix: only dx is computed."""
    spec = SPECS["3 cores"]
    plan = make_plan(spec, force)
    cores = random_cores(spec, grad=False)
    x = random_tensor(5, spec.in_features).requires_grad_()
    y = linear(x, cores, spec, plan)
    weight = random_tensor(5, spec.out_features, seed=8)
    y.backward(weight)
    torch.testing.assert_close(x.grad, weight @ rebuild(cores, spec).t(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("force", FORCES)
def test_no_work_for_gradients_that_nobody_wants(force):
    spec = SPECS["5 cores, padded"]
    plan = make_plan(spec, force, tokens=50)

    def backward_flops(x_wanted, wanted):
        cores = [c.detach().requires_grad_(k in wanted) for k, c in enumerate(random_cores(spec))]
        x = random_tensor(50, spec.in_features).requires_grad_(x_wanted)
        y = linear(x, cores, spec, plan)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return counter.get_total_flops()

    everything = backward_flops(True, range(5))
    assert everything == plan.backward_flops
    assert backward_flops(False, range(5)) < everything
    assert backward_flops(True, [1]) < everything
    frozen = backward_flops(True, [])
    assert frozen < 0.7 * everything
    if force == "keep":
        assert frozen == 2 * 50 * spec.dense_parameters


@pytest.mark.parametrize("force", FORCES)
def test_odd_inputs(force):
    spec = SPECS["5 cores, padded"]
    plan = make_plan(spec, force)
    cores = random_cores(spec)
    matrix = rebuild(cores, spec).detach()
    strided = random_tensor(spec.in_features, 3, 2).permute(2, 1, 0).requires_grad_()
    y = linear(strided, cores, spec, plan)
    assert y.shape == (2, 3, spec.out_features)
    torch.testing.assert_close(y, strided @ matrix, rtol=1e-11, atol=1e-12)
    y.sum().backward()  # an expanded gradient, without memory of its own
    torch.testing.assert_close(strided.grad, matrix.sum(1).expand(2, 3, -1))
    vector = random_tensor(spec.in_features)
    torch.testing.assert_close(linear(vector, cores, spec, plan), vector @ matrix)
    empty = torch.zeros(0, 4, spec.in_features, dtype=torch.float64, requires_grad=True)
    nothing = linear(empty, cores, spec, plan)
    assert nothing.shape == (0, 4, spec.out_features)
    for core in cores:
        core.grad = None
    nothing.sum().backward()
    assert all(core.grad is not None and not core.grad.any() for core in cores)


@pytest.mark.parametrize("force", FORCES)
def test_checkpointing_and_double_use(force):
    spec = SPECS["4 cores, ttm rule"]
    plan = make_plan(spec, force)
    back = plan_contraction(
        spec.transposed(), 6, "fp32", CPU, force=force.replace("keep", "materialise")
    )
    cores = random_cores(spec)

    def block(x):
        hidden = torch.tanh(linear(x, cores, spec, plan))
        swapped = [core.transpose(1, 2) for core in cores]
        return linear(hidden, swapped, spec.transposed(), back)

    x = random_tensor(6, spec.in_features).requires_grad_()
    matrix = rebuild(cores, spec)
    expected = torch.autograd.grad(
        (torch.tanh(x @ matrix) @ matrix.t()).square().sum(), [x, *cores]
    )
    plain = torch.autograd.grad(block(x).square().sum(), [x, *cores])
    recomputed = torch.autograd.grad(
        checkpoint(block, x, use_reentrant=False).square().sum(), [x, *cores]
    )
    for a, b, c in zip(expected, plain, recomputed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
        assert torch.equal(b, c)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_transposed_cores_give_the_transposed_matrix(spec):
    cores = random_cores(spec)
    swapped = [core.transpose(1, 2) for core in cores]
    torch.testing.assert_close(rebuild(swapped, spec.transposed()), rebuild(cores, spec).t())


def test_gauge_invariance():
    spec = SPECS["5 cores, padded"]
    cores = [core.detach() for core in random_cores(spec)]
    for bond in range(spec.num_cores - 1):
        change = random_tensor(spec.bonds[bond], spec.bonds[bond], seed=bond)
        other = list(cores)
        other[bond] = cores[bond] @ change
        other[bond + 1] = torch.tensordot(torch.linalg.inv(change), cores[bond + 1], dims=1)
        torch.testing.assert_close(rebuild(other, spec), rebuild(cores, spec), rtol=1e-9, atol=1e-9)


def test_central_gradient_formula():
    """dL/dC = (A_1 A_2)^T G (A_3 A_4)^T, with G the interleaved gradient of W."""
    spec = mpo_spec(32, 48, (2, 2, 2, 2, 2), (2, 2, 3, 2, 2))
    cores = random_cores(spec, grad=False)
    gradient = random_tensor(32, 48)
    apart = gradient.reshape(*spec.in_modes, *spec.out_modes)
    interleaved = apart.permute(0, 5, 1, 6, 2, 7, 3, 8, 4, 9)
    left = torch.tensordot(cores[0], cores[1], dims=1).reshape(16, spec.bonds[1])
    right = torch.tensordot(cores[3], cores[4], dims=1).reshape(spec.bonds[2], 16)
    expected = torch.einsum("pa,pxq,bq->axb", left, interleaved.reshape(16, 6, 16), right)
    ours = project_weight_gradient(gradient, cores, spec, [2])
    assert [k for k, value in enumerate(ours) if value is not None] == [2]
    torch.testing.assert_close(ours[2], expected.reshape(spec.core_shapes[2]))


def test_projection_is_linear_in_the_weight_gradient():
    """Gradients of W may be summed over micro-batches and projected once."""
    spec = SPECS["5 cores, padded"]
    cores = random_cores(spec, grad=False)
    one, two = (random_tensor(spec.in_features, spec.out_features, seed=s) for s in (1, 2))
    every = range(spec.num_cores)
    parts = [project_weight_gradient(g, cores, spec, every) for g in (one, two)]
    whole = project_weight_gradient(one + two, cores, spec, every)
    for a, b, c in zip(*parts, whole, strict=True):
        assert a is not None and b is not None  # noqa: PT018
        torch.testing.assert_close(a + b, c)


def test_results_do_not_depend_on_how_often_they_are_computed():
    spec = SPECS["3 cores"]
    plan = make_plan(spec, "chain:rl")
    cores = random_cores(spec, dtype=torch.float32)
    x = random_tensor(50, spec.in_features, dtype=torch.float32)
    runs = [torch.autograd.grad(linear(x, cores, spec, plan).sum(), cores) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_mismatches_are_refused():
    spec, other = SPECS["3 cores"], SPECS["2 cores"]
    cores = random_cores(spec)
    x = random_tensor(2, spec.in_features)
    with pytest.raises(ValueError, match="plan was made for"):
        linear(x, cores, spec, make_plan(other, "materialise"))
    with pytest.raises(ValueError, match="cores have the shapes"):
        linear(x, cores[:-1], spec, make_plan(spec, "materialise"))
    with pytest.raises(ValueError, match="x has 3 features"):
        linear(x[:, :3], cores, spec, make_plan(spec, "materialise"))
