"""How tokens come to their experts and back: on one rank, or through an all-to-all exchange.

A dispatcher sorts the (token, choice) pairs by expert and gives the experts one matrix of rows;
it knows neither router nor experts. Every sum over the choices of a token runs in a fixed order
over permutation indices, never by atomic additions, so that results are the same bits each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpotrain.errors import ParallelError
from mpotrain.nn.moe.permute import combine_rows, reorder_rows, take_rows


@dataclass(frozen=True)
class Exchange:
    """How rows travelled between the ranks of an expert group.

    Attributes:
        sent: rows that went to each rank.
        received: rows that came from each rank.
        order: position among the received rows of each row sorted by local expert (M,).
        place: the inverse permutation (M,).
    """

    sent: Sequence[int]
    received: Sequence[int]
    order: Tensor
    place: Tensor


@dataclass(frozen=True)
class Dispatched:
    """The rows that this rank's experts work on, and the way back.

    Attributes:
        rows: tokens sorted by local expert, within one expert in the order of the tokens (by
            source rank first, where there are several), (M, H).
        counts: rows of each local expert; they sum to M.
        order: pair ``token * k + choice`` of each row that this rank sent, (S,).
        place: row of each pair among the sent rows, (N, k); S and above for dropped pairs.
        exchange: how the rows travelled; None where they stayed.
    """

    rows: Tensor
    counts: list[int]
    order: Tensor
    place: Tensor
    exchange: Exchange | None = None


class Dispatcher(Protocol):
    """Brings tokens to experts and their results back."""

    def dispatch(self, x: Tensor, experts: Tensor, kept: Tensor | None) -> Dispatched:
        """Sort tokens by expert.

        Args:
            x: tokens (N, H).
            experts: experts of each token among all E, different ones, int64 (N, k).
            kept: pairs that are not dropped, bool (N, k); None = all.
        """
        ...

    def combine(self, rows: Tensor, dispatched: Dispatched, gates: Tensor | None) -> Tensor:
        """Return y (N, H'): for each token the sum of its rows times their gates.

        Args:
            rows: results of the local experts (M, H'), in the order of `dispatched.rows`.
            dispatched: what `dispatch` returned.
            gates: factor of each pair (N, k); None = 1. Dropped pairs contribute zero.
        """
        ...


class LocalDispatcher:
    """All experts are on this rank."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x: Tensor, experts: Tensor, kept: Tensor | None) -> Dispatched:
        """See `Dispatcher`."""
        order, place, loads = sort_pairs(experts, kept, self.num_experts)
        counts = loads.tolist()
        order = order[: sum(counts)]
        return Dispatched(take_rows(x, order, place), counts, order, place)

    def combine(self, rows: Tensor, dispatched: Dispatched, gates: Tensor | None) -> Tensor:
        """See `Dispatcher`."""
        return combine_rows(rows, gates, dispatched.order, dispatched.place)


class AllToAllDispatcher:
    """Experts lie on the ranks of a group: rank r of p owns [r E / p, (r + 1) E / p).

    Both methods and their backward passes are collective: every rank of the group takes part in
    every one of them, also with no row to send or receive, because the graph of autograd does not
    depend on the data.

    Attributes:
        num_experts: E, all experts.
        group: the ranks that share them.

    Raises:
        ParallelError: the number of ranks does not divide the number of experts.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts, self.group = num_experts, group
        self.num_ranks = dist.get_world_size(group)
        if num_experts % self.num_ranks:
            raise ParallelError(
                f"{num_experts} experts cannot be spread evenly over {self.num_ranks} ranks; "
                "parallel.expert must divide model.moe.num_experts"
            )

    def dispatch(self, x: Tensor, experts: Tensor, kept: Tensor | None) -> Dispatched:
        """See `Dispatcher`; rows of other ranks' tokens are among the result."""
        order, place, loads = sort_pairs(experts, kept, self.num_experts)
        arriving = torch.empty_like(loads)
        dist.all_to_all_single(arriving, loads, group=self.group)
        # The one host synchronisation of a mixture: sizes of the exchange and of the products.
        leaving_counts, arriving_counts = torch.stack([loads, arriving]).tolist()
        sent, received = self._by_rank(leaving_counts), self._by_rank(arriving_counts)
        order = order[: sum(sent)]
        rows = exchange_rows(take_rows(x, order, place), sent, received, self.group)
        exchange = Exchange(sent, received, *self._by_expert(arriving, sum(received)))
        return Dispatched(
            rows=reorder_rows(rows, exchange.order, exchange.place),
            counts=self._of_experts(arriving_counts),
            order=order,
            place=place,
            exchange=exchange,
        )

    def combine(self, rows: Tensor, dispatched: Dispatched, gates: Tensor | None) -> Tensor:
        """See `Dispatcher`; rows of other ranks' tokens return to them."""
        exchange = dispatched.exchange
        if exchange is None:
            raise ValueError("the rows were dispatched locally, so they cannot be sent back")
        rows = reorder_rows(rows, exchange.place, exchange.order)
        rows = exchange_rows(rows, exchange.received, exchange.sent, self.group)
        return combine_rows(rows, gates, dispatched.order, dispatched.place)

    def _by_rank(self, counts: list[int]) -> list[int]:
        """Sum counts of single experts, (p * E / p,) in the order of the ranks, by rank."""
        local = self.num_experts // self.num_ranks
        return [sum(counts[r * local : (r + 1) * local]) for r in range(self.num_ranks)]

    def _of_experts(self, counts: list[int]) -> list[int]:
        """Sum counts of local experts, (p * E / p,) source rank by source rank, by expert."""
        local = self.num_experts // self.num_ranks
        return [sum(counts[e::local]) for e in range(local)]

    def _by_expert(self, arriving: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return the permutation from (source rank, expert) to (expert, source rank) order."""
        local = self.num_experts // self.num_ranks
        numbers = torch.arange(local, device=arriving.device).repeat(self.num_ranks)
        owner = torch.repeat_interleave(numbers, arriving, output_size=total)
        order = owner.argsort(stable=True)
        return order, _inverse(order)


def sort_pairs(
    experts: Tensor, kept: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the (token, choice) pairs by expert, dropped pairs last.

    Args:
        experts: experts of each token, int64 (N, k).
        kept: pairs that are not dropped, bool (N, k); None = all.
        num_experts: E.

    Returns:
        Pairs ``token * k + choice`` in sorted order (N * k,); the place of each pair in it (N, k);
        the number of kept pairs of each expert, int64 (E,).
    """
    keys = experts if kept is None else experts.masked_fill(~kept, num_experts)
    ordered, order = keys.reshape(-1).sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=experts.device)
    loads = torch.searchsorted(ordered, bounds).diff()
    return order, _inverse(order).view(experts.shape), loads


def _inverse(order: Tensor) -> Tensor:
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place


class _ExchangeRows(torch.autograd.Function):
    """Uneven all-to-all of rows; the backward pass is the reversed exchange."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


exchange_rows: Callable[..., Tensor] = _ExchangeRows.apply
"""Send rows (S, H), sorted by rank, and receive (M, H): (rows, sent, received, group)."""


def _all_to_all(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    result = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent), group=group)
    return result
