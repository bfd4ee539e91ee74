"""Experts spread over ranks against all experts on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mpotrain.errors import ParallelError
from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    MPOExpertSite,
    RouterConfig,
)
from mpotrain.nn.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from mpotrain.nn.moe.experts import DenseExperts, MPOExperts
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.moe.router import Router
from mpotrain.nn.roles import experts_of
from mpotrain.parallel.ranks import World

HIDDEN, FFN, NUM_EXPERTS = 8, 12, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "switch": {"capacity_factor": 0.8},
    "mpoe": {"gate": "straight_through", "gate_at": "input", "bias": True},
    "top-2": {"top_k": 2, "bias": True, "capacity_factor": 1.1},
    "top-3": {"top_k": 3, "jitter": 0.3},
}


def build(kind: str, options: dict[str, Any]) -> MixtureOfExperts:
    generator = torch.Generator().manual_seed(0)

    def experts(site: Any, rows: int, columns: int) -> torch.nn.Module:
        draw = {"bias": site.bias, "std": 0.3, "generator": generator}
        if isinstance(site, DenseExpertSite):
            return DenseExperts(rows, columns, NUM_EXPERTS, **draw)
        return MPOExperts(site.spec(rows, columns), site, NUM_EXPERTS, **draw)

    first, second = {
        "dense": (DenseExpertSite(), DenseExpertSite()),
        "mpo": (
            MPOExpertSite(start="independent", in_modes=(2, 2, 2), out_modes=(3, 2, 2), cap=5),
            AsymmetricExpertSite(start="independent", in_mode=4, out_mode=2),
        ),
    }[kind]
    module = MixtureOfExperts(
        Router(HIDDEN, NUM_EXPERTS, RouterConfig(**options), std=0.8, generator=generator),
        experts(first, HIDDEN, FFN),
        experts(second, FFN, HIDDEN),
        LocalDispatcher(NUM_EXPERTS),
    ).double()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return module


def tokens_of(rank: int) -> Tensor:
    """Every rank has tokens, and loads, of its own."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(2, 3 + 2 * rank, HIDDEN, generator=generator, dtype=torch.float64)


def run(
    module: MixtureOfExperts, rank: int, recompute: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    """Outputs and the gradient of x on one rank; parameter gradients add up in the module."""
    x = tokens_of(rank).requires_grad_()
    torch.manual_seed(50 + rank)
    y, auxiliary, statistics = (
        checkpoint(module, x, use_reentrant=False) if recompute else module(x)
    )
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(rank)).double()
    ((y * upstream).sum() + auxiliary).backward()
    assert x.grad is not None
    return [y.detach(), auxiliary.detach(), x.grad], statistics


def spread(module: MixtureOfExperts, world: World) -> None:
    """Do what an engine does: keep this rank's experts and exchange tokens."""
    local = NUM_EXPERTS // world.size
    for parameter in module.parameters():
        if experts_of(parameter):
            parameter.data = parameter.data[world.rank * local : (world.rank + 1) * local].clone()
    group = dist.group.WORLD
    assert group is not None
    module.dispatcher = AllToAllDispatcher(NUM_EXPERTS, group)


def prepare(module: MixtureOfExperts, favourite: int | None) -> MixtureOfExperts:
    if favourite is not None:
        assert module.router.bias is not None
        module.router.bias.data[favourite] = 100.0
    return module


def on_ranks(
    world: World, kind: str, options: dict[str, Any], favourite: int | None, recompute: bool
) -> Any:
    module = prepare(build(kind, options), favourite)
    spread(module, world)
    rows: list[int] = []
    module.c_fc.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    outputs, statistics = run(module, world.rank, recompute)
    gradients = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if experts_of(parameter):
            gradients[name] = parameter.grad
        else:
            gradients[name] = world.all_reduce_sum(parameter.grad.clone())
    with torch.no_grad():
        held = module.eval()(tokens_of(world.rank))[0]
    return outputs, statistics, gradients, held, rows


def compare(run_ranks: Any, size: int, kind: str, options: dict[str, Any], **how: Any) -> list[Any]:
    favourite, recompute = how.get("favourite"), how.get("recompute", False)
    outcomes = run_ranks(size)(on_ranks, kind, options, favourite, recompute)
    module = prepare(build(kind, options), favourite)
    for rank, (outputs, statistics, _, _, _) in enumerate(outcomes):
        wanted, wanted_statistics = run(module, rank, False)
        for ours, theirs in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        for name, value in statistics.items():
            assert torch.equal(value, wanted_statistics[name]), name
    for name, parameter in module.named_parameters():
        parts = [outcome[2][name] for outcome in outcomes]
        ours = torch.cat(parts) if experts_of(parameter) else parts[0]
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-6, atol=1e-9, msg=name)
    module.eval()
    for rank, outcome in enumerate(outcomes):
        torch.testing.assert_close(outcome[3], module(tokens_of(rank))[0], rtol=1e-6, atol=1e-9)
    return [outcome[4] for outcome in outcomes]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", ["dense", "mpo"])
@pytest.mark.parametrize("size", [2, 4])
def test_equals_local_experts(
    run_ranks: Any, size: int, kind: str, options: dict[str, Any]
) -> None:
    compare(run_ranks, size, kind, options)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["dense", "mpo"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_without_rows_take_part(
    run_ranks: Any, size: int, kind: str, recompute: bool
) -> None:
    rows = compare(
        run_ranks, size, kind, OPTIONS["mpoe"], favourite=NUM_EXPERTS - 1, recompute=recompute
    )
    assert [bool(max(counts)) for counts in rows] == [False] * (size - 1) + [True]


def test_recomputed_activations_equal_local_experts(run_ranks: Any) -> None:
    compare(run_ranks, 2, "mpo", OPTIONS["top-3"], recompute=True)
    compare(run_ranks, 2, "dense", OPTIONS["switch"], recompute=True)


def sparse_rows(world: World, kept_on: int, dtype: torch.dtype) -> Any:
    """Only rank `kept_on` sends anything; expert e adds e."""
    group = dist.group.WORLD
    assert group is not None
    dispatcher = AllToAllDispatcher(NUM_EXPERTS, group)
    x = torch.arange(6.0).view(3, 2).to(dtype).requires_grad_()
    experts = torch.tensor([[3, 0], [1, 3], [0, 2]])
    kept = torch.full((3, 2), world.rank == kept_on)
    dispatched = dispatcher.dispatch(x, experts, kept)
    local = NUM_EXPERTS // world.size
    added = [world.rank * local + e for e, n in enumerate(dispatched.counts) for _ in range(n)]
    rows = dispatched.rows + torch.tensor(added, dtype=dtype).view(-1, 1)
    y = dispatcher.combine(rows, dispatched, None)
    y.sum().backward()
    assert x.grad is not None
    return dispatched.rows.detach(), dispatched.counts, y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rank_whose_pairs_are_all_dropped_still_exchanges(
    run_ranks: Any, dtype: torch.dtype
) -> None:
    first, second = run_ranks(2)(sparse_rows, 1, dtype)
    assert first[0].tolist() == [[0, 1], [4, 5], [2, 3]]
    assert first[1] == [2, 1]
    assert second[0].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert second[1] == [1, 2]
    assert first[2].tolist() == [[0, 0]] * 3
    assert first[3].tolist() == [[0, 0]] * 3
    assert second[2].tolist() == [[3, 5], [8, 10], [10, 12]]
    assert second[3].tolist() == [[2, 2]] * 3
    assert all(part.dtype == dtype for part in (*first[::2], second[3]))


def uneven(world: World) -> str:
    group = dist.group.WORLD
    assert group is not None
    with pytest.raises(ParallelError) as caught:
        AllToAllDispatcher(5, group)
    return str(caught.value)


def test_experts_must_be_spread_evenly(run_ranks: Any) -> None:
    for text in run_ranks(2)(uneven):
        assert "5 experts cannot be spread evenly over 2 ranks" in text
        assert "parallel.expert" in text
