"""Matrices kept over the micro-batches of a step against matrices rebuilt in each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensor_cases import SPECS, make_plan, random_cores, random_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mpotrain.tensor import contract
from mpotrain.tensor.cached import CachedMatrix, StepCache
from mpotrain.tensor.spec import MPOSpec

Forward = Callable[[Tensor, list[Tensor], Tensor | None], Tensor]
TOKENS = 6


def uncached(spec: MPOSpec) -> Forward:
    plan = make_plan(spec, "materialise")
    return lambda x, cores, bias: contract.linear(x, cores, spec, plan, bias)


def run(
    forward: Forward,
    spec: MPOSpec,
    microbatches: int,
    *,
    ahead: int = 1,
    recompute: bool | None = None,
    dtype: torch.dtype = torch.float64,
    inputs_want_gradients: bool = True,
) -> dict[str, list[Tensor]]:
    """Run micro-batches of a non-linear loss with `ahead` forward passes before each backward.

    recompute: None = no, True = with a first pass outside autograd, False = with torch's other way.
    """
    cores = random_cores(spec)
    bias = random_tensor(spec.out_features, seed=2).requires_grad_()
    xs = [random_tensor(2, TOKENS // 2, spec.in_features, seed=10 + m) for m in range(microbatches)]
    xs = [x.to(dtype).requires_grad_(inputs_want_gradients) for x in xs]

    def layer(x: Tensor) -> Tensor:
        if recompute is None:
            return forward(x, cores, bias)
        return checkpoint(forward, x, cores, bias, use_reentrant=recompute)

    waiting, outputs = [], []
    for x in xs:
        y = layer(x)
        outputs.append(y.detach())
        waiting.append((y.double() ** 2).sum() / microbatches)
        if len(waiting) == ahead:
            waiting.pop(0).backward()
    for loss in waiting:
        loss.backward()
    return {
        "outputs": outputs,
        "inputs": [x.grad for x in xs if x.grad is not None],
        "cores": [core.grad for core in cores if core.grad is not None],
        "bias": [] if bias.grad is None else [bias.grad],
    }


def assert_equal(found: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]]) -> None:
    for key, tensors in wanted.items():
        assert len(found[key]) == len(tensors)
        for a, b in zip(found[key], tensors, strict=True):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max(), key


def cached(spec: MPOSpec, num_layers: int = 1) -> tuple[StepCache, CachedMatrix]:
    cache, stand_ins = StepCache(), random_cores(spec)
    for _ in range(num_layers):
        matrix = cache.matrix(stand_ins, spec)
    return cache, matrix


@pytest.mark.parametrize("recompute", [None, True, False])
@pytest.mark.parametrize(("microbatches", "ahead"), [(1, 1), (2, 1), (4, 1), (4, 3), (4, 4)])
@pytest.mark.parametrize("name", ["3 cores", "5 cores, padded"])
def test_equals_rebuilding_in_every_microbatch(
    name: str, microbatches: int, ahead: int, recompute: bool | None
) -> None:
    spec = SPECS[name]
    cache, matrix = cached(spec)
    wanted = run(uncached(spec), spec, microbatches)
    for step in range(1, 3):
        with cache.step(microbatches):
            found = run(matrix.linear, spec, microbatches, ahead=ahead, recompute=recompute)
        assert_equal(found, wanted)
        assert matrix.num_rebuilds == step
        assert matrix.num_projections == step


@pytest.mark.parametrize("name", list(SPECS))
def test_all_kinds_of_operators(name: str) -> None:
    spec = SPECS[name]
    cache, matrix = cached(spec)
    with cache.step(2):
        found = run(matrix.linear, spec, 2, ahead=2)
    assert_equal(found, run(uncached(spec), spec, 2))


def test_inputs_without_gradients() -> None:
    spec = SPECS["2 cores"]
    cache, matrix = cached(spec)
    with cache.step(3):
        found = run(matrix.linear, spec, 3, inputs_want_gradients=False)
    assert_equal(found, run(uncached(spec), spec, 3, inputs_want_gradients=False))


def test_bf16_inputs_are_summed_in_fp32() -> None:
    spec = SPECS["3 cores"]
    cache, matrix = cached(spec)
    with cache.step(4):
        found = run(matrix.linear, spec, 4, dtype=torch.bfloat16)
    wanted = run(uncached(spec), spec, 4, dtype=torch.bfloat16)
    for a, b in zip(found["cores"], wanted["cores"], strict=True):
        # Each micro-batch rounds its dW to bf16 in both; a sum in bf16 would be 100 times off.
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    assert found["outputs"][0].dtype == torch.bfloat16


def test_cores_get_their_gradient_in_the_last_backward_pass_alone() -> None:
    spec = SPECS["3 cores"]
    cores = random_cores(spec)
    cache = StepCache()
    matrix = cache.matrix(cores, spec)
    seen: list[int] = []
    for core in cores:
        core.register_post_accumulate_grad_hook(lambda _: seen.append(done))
    with cache.step(3):
        losses = [
            matrix.linear(random_tensor(4, spec.in_features, seed=m), cores).sum() for m in range(3)
        ]
        for done, loss in enumerate(losses):
            loss.backward()
            assert all((core.grad is None) == (done < 2) for core in cores)
    assert seen == [2, 2, 2]


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_share_all_cores(recompute: bool) -> None:
    spec = SPECS["bonds of one"]
    found = [shared_gradients(spec, is_cached, recompute) for is_cached in (False, True)]
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def shared_gradients(spec: MPOSpec, is_cached: bool, recompute: bool) -> list[Tensor]:
    cores, cache = random_cores(spec), StepCache()
    matrix, other, third = (cache.matrix(cores, spec) for _ in range(3))
    assert matrix is other is third
    forward: Forward = matrix.linear if is_cached else uncached(spec)

    def layer(x: Tensor) -> Tensor:
        return torch.tanh(forward(x, cores, None))

    with cache.step(2):
        for m in range(2):
            x = random_tensor(4, spec.in_features, seed=m).requires_grad_()
            for _ in range(3):
                x = checkpoint(layer, x, use_reentrant=True) if recompute else layer(x)
            x.sum().backward()
    assert (matrix.num_rebuilds, matrix.num_projections) == (is_cached, is_cached)
    return [core.grad for core in cores if core.grad is not None]


def test_frozen_cores_get_no_gradient() -> None:
    spec = SPECS["3 cores"]
    cores = random_cores(spec)
    reference = random_cores(spec)
    cache = StepCache()
    matrix = cache.matrix(cores, spec)
    cores[1].requires_grad_(False)
    x = random_tensor(4, spec.in_features)
    contract.linear(x, reference, spec, make_plan(spec, "materialise")).sum().mul(2).backward()
    with cache.step(2):
        for _ in range(2):
            matrix.linear(x, cores).sum().backward()
    assert cores[1].grad is None
    for k in (0, 2):
        torch.testing.assert_close(cores[k].grad, reference[k].grad, rtol=1e-12, atol=1e-12)
    for core in cores:
        core.requires_grad_(False)
    x.requires_grad_()
    with cache.step(1):
        matrix.linear(x, cores).sum().backward()
    weight = contract.rebuild(cores, spec)
    torch.testing.assert_close(x.grad, weight.sum(1).expand(4, -1))


def test_no_step_sees_the_matrix_of_another() -> None:
    spec = SPECS["2 cores"]
    cores = random_cores(spec)
    cache = StepCache()
    matrix = cache.matrix(cores, spec)
    x = random_tensor(3, spec.in_features)

    def expected() -> Tensor:
        return x @ contract.rebuild(cores, spec)

    def fail() -> None:
        with cache.step(2):
            matrix.linear(x, cores).sum().backward()
            raise ValueError("the step fails")

    with pytest.raises(ValueError, match="the step fails"):
        fail()
    assert not matrix.is_open
    with pytest.raises(RuntimeError, match="no step"):
        matrix.linear(x, cores)
    with torch.no_grad():
        cores[0].mul_(2.0)
    with cache.step(1):
        with torch.no_grad():
            torch.testing.assert_close(matrix.linear(x, cores), expected())
        matrix.linear(x, cores).sum().backward()
    reference = [core.detach().clone().requires_grad_() for core in cores]
    (x @ contract.rebuild(reference, spec)).sum().backward()
    for core, twin in zip(cores, reference, strict=True):
        torch.testing.assert_close(core.grad, twin.grad)


def test_missing_late_and_surplus_backward_passes_are_refused() -> None:
    spec = SPECS["2 cores"]
    cores = random_cores(spec)
    cache = StepCache()
    matrix = cache.matrix(cores, spec)
    x = random_tensor(3, spec.in_features)

    def forget() -> Tensor:
        with cache.step(2):
            matrix.linear(x, cores).sum().backward()
            late: Tensor = matrix.linear(x, cores).sum()
            kept.append(late)
        return late

    kept: list[Tensor] = []
    with pytest.raises(RuntimeError, match="1 of 2 backward passes"):
        forget()
    with pytest.raises(RuntimeError, match="step that has ended"):
        kept[0].backward()

    def backwards() -> None:
        with cache.step(2):
            first, last = (matrix.linear(x, cores).sum() for _ in range(2))
            last.backward()
            first.backward()

    with pytest.raises(RuntimeError, match="does not belong to its last micro-batch"):
        backwards()

    def nested() -> None:
        with cache.step(1), cache.step(1):
            pass

    with pytest.raises(RuntimeError, match="open already"):
        nested()


def test_an_unused_matrix_and_a_look_without_autograd_are_no_fault() -> None:
    spec = SPECS["2 cores"]
    cache, matrix = cached(spec)
    with cache.step(2):
        pass
    with cache.step(2), torch.no_grad():
        matrix.linear(random_tensor(3, spec.in_features), random_cores(spec))
    assert matrix.num_projections == 0


def test_nothing_is_kept_after_the_last_backward_pass() -> None:
    spec = SPECS["2 cores"]
    cores = random_cores(spec)
    cache = StepCache()
    matrix = cache.matrix(cores, spec)
    with cache.step(1):
        matrix.linear(random_tensor(3, spec.in_features), cores).sum().backward()
        step = matrix._step
        assert step is not None
        assert step._weight is None
        assert step._gradient is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_layers_recomputed_as_one(reentrant: bool) -> None:
    """Nothing stops the second pass early: all that it saves is held against the first."""
    spec = MPOSpec((4, 2), (2, 4), (3,))
    generator = torch.Generator().manual_seed(5)
    cores = [
        [
            torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in spec.core_shapes
        ]
        for _ in range(2)
    ]
    inputs = [torch.randn(3, 8, generator=generator, dtype=torch.float64) for _ in range(4)]

    def gradients(layers: list[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        both = [core for layer in cores for core in layer]
        for core in both:
            core.grad = None
        for x in inputs:
            x = x.clone().requires_grad_()
            y = checkpoint(
                lambda v: layers[1](layers[0](v).tanh()).tanh(), x, use_reentrant=reentrant
            )
            y.square().sum().backward()
        return [core.grad.clone() for core in both if core.grad is not None]

    cache = StepCache()
    matrices = [cache.matrix(layer, spec) for layer in cores]
    plain = gradients([lambda x, c=layer: x @ contract.rebuild(c, spec) for layer in cores])
    with cache.step(len(inputs)):
        cached = gradients(
            [
                lambda x, m=matrix, c=layer: m.linear(x, c)
                for matrix, layer in zip(matrices, cores, strict=True)
            ]
        )
    assert len(plain) == len(cached) == 4
    for found, wanted in zip(cached, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert [matrix.num_projections for matrix in matrices] == [1, 1]
