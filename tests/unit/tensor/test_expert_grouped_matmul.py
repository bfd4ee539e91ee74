"""Products of sorted rows with a matrix for each expert, on the loop and on the grouped kernel."""

from __future__ import annotations

import pytest
import torch
from tensor_cases import random_tensor

from mpotrain.tensor import grouped
from mpotrain.tensor.grouped import grouped_matmul, rows_gradients, rows_times, weight_gradients

COUNTS = [(2, 3, 1), (0, 4, 0), (0, 0, 0), (6, 0, 0)]


def reference(x, weight, counts, bias):
    parts = [
        rows @ weight[expert] + bias[expert] for expert, rows in enumerate(x.split(list(counts)))
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("counts", COUNTS)
def test_output_and_gradients_equal_a_loop(counts):
    x = random_tensor(sum(counts), 5, seed=1).requires_grad_()
    weight = random_tensor(3, 5, 4, seed=2).requires_grad_()
    bias = random_tensor(3, 4, seed=3).requires_grad_()
    dy = random_tensor(sum(counts), 4, seed=4)
    y = grouped_matmul(x, weight, counts, bias)
    expected = reference(x, weight, counts, bias)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y, [x, weight, bias], dy)
    wanted = torch.autograd.grad(expected, [x, weight, bias], dy, materialize_grads=True)
    for gradient, target in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, target, rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    x = random_tensor(4, 3, seed=1).requires_grad_()
    weight = random_tensor(3, 3, 2, seed=2).requires_grad_()
    bias = random_tensor(3, 2, seed=3).requires_grad_()
    run = lambda x, weight, bias: grouped_matmul(x, weight, (3, 0, 1), bias)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_computed(wants):
    counts = (2, 0, 1)
    x, weight = random_tensor(3, 5, seed=1), random_tensor(3, 5, 4, seed=2)
    dy = random_tensor(3, 4, seed=3)
    d_rows, d_weight = rows_gradients(dy, x, weight, counts, wants)
    assert (d_rows is not None, d_weight is not None) == wants
    if d_rows is not None:
        torch.testing.assert_close(d_rows, rows_times(dy, weight.mT, counts))
    if d_weight is not None:
        torch.testing.assert_close(d_weight, weight_gradients(dy, x, counts))


def test_weights_are_used_in_the_dtype_of_the_rows():
    x = random_tensor(4, 16, dtype=torch.bfloat16).requires_grad_()
    weight = random_tensor(2, 16, 8, dtype=torch.float32).requires_grad_()
    bias = random_tensor(2, 8, dtype=torch.float32).requires_grad_()
    y = grouped_matmul(x, weight, (1, 3), bias)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_a_bias_gradient_of_many_bf16_rows_is_summed_in_fp32():
    rows = 2049  # not a bf16 number
    bias = torch.zeros(1, 8, requires_grad=True)
    x = torch.zeros(rows, 8, dtype=torch.bfloat16)
    y = grouped_matmul(x, torch.zeros(1, 8, 8, dtype=torch.bfloat16), (rows,), bias)
    y.backward(torch.ones_like(y))
    assert torch.equal(bias.grad, torch.full_like(bias, rows))


@pytest.mark.parametrize("counts", [(16, 8, 8), (0, 32, 0), (5, 0, 27)])
def test_the_grouped_kernel_and_the_loop_agree(monkeypatch, counts):
    # torch's grouped product also runs on the CPU: this checks the offsets, layouts and the
    # experts without rows of that path without a GPU.
    x = random_tensor(32, 16, seed=1, dtype=torch.bfloat16)
    weight = random_tensor(3, 16, 24, seed=2, dtype=torch.bfloat16)
    dy = random_tensor(32, 24, seed=3, dtype=torch.bfloat16)

    def everything():
        return (
            rows_times(x, weight, counts),
            rows_times(dy, weight.mT, counts),
            weight_gradients(dy, x, counts),
            rows_times(x, weight, counts, torch.empty(32, 24, dtype=torch.bfloat16)),
        )

    loop, calls = everything(), []
    kernel = grouped.functional.grouped_mm

    def spy(*arguments, **options):
        calls.append(1)
        product = kernel(*arguments, **options)
        if product.ndim == 3:
            product[[count == 0 for count in counts]] = float("nan")
        return product

    monkeypatch.setattr(grouped, "_fits_grouped_kernel", lambda *_: True)
    monkeypatch.setattr(grouped.functional, "grouped_mm", spy)
    for got, target in zip(everything(), loop, strict=True):
        torch.testing.assert_close(got, target)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("x", "weight", "counts", "bias", "message"),
    [
        ((4, 5), (2, 4, 3), (2, 2), None, "cannot multiply"),
        ((4, 5), (5, 3), (2, 2), None, "cannot multiply"),
        ((4, 5), (2, 5, 3), (2, 1), None, "do not spread"),
        ((4, 5), (2, 5, 3), (2, 1, 1), None, "do not spread"),
        ((4, 5), (2, 5, 3), (5, -1), None, "do not spread"),
        ((4, 5), (2, 5, 3), (2, 2), (2, 5), "bias"),
        ((4, 5), (2, 5, 3), (2, 2), (3,), "bias"),
    ],
)
def test_what_does_not_fit_together_is_refused(x, weight, counts, bias, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(
            torch.zeros(x),
            torch.zeros(weight),
            counts,
            None if bias is None else torch.zeros(bias),
        )
