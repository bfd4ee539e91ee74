"""Local dispatch and combine against a loop over the pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpotrain.nn.moe.dispatch import AllToAllDispatcher, Dispatched, LocalDispatcher
from mpotrain.nn.moe.permute import combine_rows, reorder_rows, take_rows

WIDTH = 3


def choices(num_tokens: int, top_k: int, num_experts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(num_tokens, num_experts, generator=generator)
    return noise.argsort(dim=1)[:, :top_k]


def by_loop(
    x: Tensor, gates: Tensor | None, experts: Tensor, kept: Tensor | None, num_experts: int
) -> tuple[Tensor, list[int], Tensor]:
    """Rows, counts, and the combination of rows that expert e has multiplied by e + 1."""
    pairs = [
        (e, n)
        for e in range(num_experts)
        for n in range(len(x))
        for c in range(experts.shape[1])
        if experts[n, c] == e and (kept is None or kept[n, c])
    ]
    rows = torch.stack([x[n] for _, n in pairs]) if pairs else x[:0]
    counts = [sum(e == owner for owner, _ in pairs) for e in range(num_experts)]
    y = [torch.zeros_like(token) for token in x]
    for n in range(len(x)):
        for c in range(experts.shape[1]):
            if kept is None or kept[n, c]:
                gate = 1.0 if gates is None else gates[n, c]
                y[n] = y[n] + gate * (int(experts[n, c]) + 1) * x[n]
    return rows, counts, torch.stack(y)


def numbered(dispatched: Dispatched) -> Tensor:
    """What experts do here: expert e multiplies its rows by e + 1."""
    factors = [e + 1.0 for e, count in enumerate(dispatched.counts) for _ in range(count)]
    return dispatched.rows * torch.tensor(factors, dtype=dispatched.rows.dtype)[:, None]


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 9),
    num_experts=st.integers(1, 5),
    top_k=st.integers(1, 3),
    dropping=st.sampled_from([None, 0.0, 0.4, 1.0]),
    gated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_dispatch_and_combine_equal_the_loop(
    num_tokens: int, num_experts: int, top_k: int, dropping: float | None, gated: bool, seed: int
) -> None:
    top_k = min(top_k, num_experts)
    generator = torch.Generator().manual_seed(seed)
    experts = choices(num_tokens, top_k, num_experts, seed)
    kept = None
    if dropping is not None:
        kept = torch.rand(num_tokens, top_k, generator=generator) >= dropping
    x = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    gates = None
    if gated:
        gates = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64)
        gates.requires_grad_()
    dispatcher = LocalDispatcher(num_experts)
    dispatched = dispatcher.dispatch(x, experts, kept)
    y = dispatcher.combine(numbered(dispatched), dispatched, gates)
    rows, counts, wanted = by_loop(x, gates, experts, kept, num_experts)
    assert torch.equal(dispatched.rows, rows)
    assert dispatched.counts == counts
    torch.testing.assert_close(y, wanted)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    inputs = [x] if gates is None else [x, gates]
    ours = torch.autograd.grad((y * upstream).sum(), inputs)
    if wanted.requires_grad:
        theirs = torch.autograd.grad((wanted * upstream).sum(), inputs, allow_unused=True)
    else:
        theirs = (None,) * len(inputs)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, torch.zeros_like(left) if right is None else right)


def test_gradients_by_finite_differences() -> None:
    experts = choices(5, 2, 3, 0)
    kept = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    dispatched = LocalDispatcher(3).dispatch(torch.zeros(5, 2), experts, kept)
    order, place = dispatched.order, dispatched.place
    x, rows, gates = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 2), (6, 2), (5, 2))
    )
    assert len(order) == 6
    assert torch.autograd.gradcheck(lambda x: take_rows(x, order, place), (x,))
    combine = lambda rows, gates: combine_rows(rows, gates, order, place)  # noqa: E731
    assert torch.autograd.gradcheck(combine, (rows, gates))
    swap = torch.tensor([2, 0, 1, 5, 3, 4])
    assert torch.autograd.gradcheck(lambda rows: reorder_rows(rows, swap, swap.argsort()), (rows,))


def test_sixteen_bit_rows_are_summed_in_fp32() -> None:
    experts = torch.tensor([[0, 1, 2]])
    dispatcher = LocalDispatcher(3)
    dispatched = dispatcher.dispatch(torch.ones(1, 1, dtype=torch.bfloat16), experts, None)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    # In bf16 256 + 1 is 256, and a gate of 1.0039 is 1.
    y = dispatcher.combine(rows, dispatched, None)
    assert y.dtype == torch.bfloat16
    assert y.tolist() == [[258.0]]
    gates = torch.tensor([[1.0, 1.001, 1.001]])
    assert dispatcher.combine(rows, dispatched, gates).tolist() == [[258.0]]


def test_rows_are_kept_only_where_gates_want_a_gradient() -> None:
    dispatcher = LocalDispatcher(4)
    x = torch.randn(6, WIDTH, requires_grad=True)
    dispatched = dispatcher.dispatch(x, choices(6, 2, 4, 0), None)

    def saved_floats(gates: Tensor | None) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() if tensor.is_floating_point() else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            dispatcher.combine(dispatched.rows, dispatched, gates)
        return sum(sizes)

    gates = torch.rand(6, 2)
    assert saved_floats(None) == 0
    assert saved_floats(gates) == gates.numel()
    assert saved_floats(gates.requires_grad_()) == gates.numel() + 12 * WIDTH


def test_rows_that_did_not_travel_are_not_sent_back() -> None:
    dispatched = LocalDispatcher(2).dispatch(torch.ones(2, 1), torch.zeros(2, 1).long(), None)
    dispatcher = AllToAllDispatcher.__new__(AllToAllDispatcher)
    with pytest.raises(ValueError, match="dispatched locally"):
        dispatcher.combine(dispatched.rows, dispatched, None)
