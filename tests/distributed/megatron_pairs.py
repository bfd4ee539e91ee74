"""Pairs of a column-parallel and a row-parallel layer, and the local layers they stand for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from distributed.megatron_comparison import draw, make_slots, redraw
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.models.sites import Site
from mpotrain.nn.config import DenseSite, MPOSite, TTMSite
from mpotrain.nn.linear import DenseLinear, TensorizedLinear
from mpotrain.nn.sharing import Adapter, LayerLinear, Parts, SharedLinear, project
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.tensor.init import init_cores

Choice = DenseSite | MPOSite | TTMSite


@dataclass(frozen=True)
class Pair:
    """Two matrices with an element-wise function between.

    Attributes:
        first: representation of hidden -> blocks * features.
        second: representation of features -> hidden.
        features: between the two.
        period: by which they are shared out.
        blocks: 1: gelu between; 3: a function of three blocks, as of queries, keys and values.
        hidden: outside.
        is_shared: whether central tensors come from elsewhere.
        rank: of low-rank additions; 0 = none.
        bias: whether there are biases.
    """

    first: Choice
    second: Choice
    features: int
    period: int
    blocks: int = 1
    hidden: int = 24
    is_shared: bool = False
    rank: int = 0
    bias: bool = True

    def sites(self) -> tuple[Site, Site]:
        """Return the sites of both."""
        wide = self.blocks * self.features
        return (
            self._site("first", "c_fc", self.hidden, wide, self.first),
            self._site("second", "c_proj", self.features, self.hidden, self.second),
        )

    def _site(self, name: str, family: str, rows: int, columns: int, choice: Choice) -> Site:
        spec = choice.spec(rows, columns)
        bank = f"central_{name}" if self.is_shared and spec is not None else None
        return Site(name, family, rows, columns, choice, spec, self.bias, bank=bank)

    def between(self, y: Tensor) -> Tensor:
        """Return what the second layer takes, for any part of the features."""
        if self.blocks == 1:
            return functional.gelu(y)
        q, k, v = y.unflatten(-1, (3, -1)).unbind(-2)
        return torch.tanh(q) * k + v


def mpo(in_modes: tuple[int, ...], out_modes: tuple[int, ...], **given: Any) -> MPOSite:
    return MPOSite(in_modes=in_modes, out_modes=out_modes, cap=given.pop("cap", 4), **given)


class Local(nn.Module):
    """The reference: the project's own layers, whole, on one rank."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair
        generator = torch.Generator().manual_seed(1)
        for site in pair.sites():
            self.add_module(site.name, _layer(site, generator))
            if site.bank is not None and site.spec is not None:
                central = init_cores(site.spec, 0.3, generator=generator)[site.spec.central_index]
                self.register_parameter(site.bank, nn.Parameter(central))
            if pair.rank:
                adapter = Adapter(
                    site.in_features, site.out_features, pair.rank, std=0.3, generator=generator
                )
                self.add_module(f"adapter_{site.name}", adapter)
        redraw(self)

    def linear(self, site: Site, x: Tensor) -> Tensor:
        parts: Parts = {}
        if site.bank is not None:
            parts["central"] = self.get_parameter(site.bank)
        if self.pair.rank:
            adapter = self.get_submodule(f"adapter_{site.name}")
            parts["u"], parts["d"] = adapter.get_parameter("u"), adapter.get_parameter("d")
        return project(self.get_submodule(site.name), x, parts)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.pair.sites()
        return self.linear(second, self.pair.between(self.linear(first, x)))


def _layer(site: Site, generator: torch.Generator) -> LayerLinear:
    draw: dict[str, Any] = {"bias": site.bias, "std": 0.3}
    if site.spec is None:
        return DenseLinear(site.in_features, site.out_features, **draw, generator=generator)
    assert isinstance(site.choice, MPOSite | TTMSite)
    if site.bank is None:
        return TensorizedLinear(site.spec, site.choice, **draw, generator=generator)
    cores = init_cores(site.spec, 0.3, generator=generator)
    del cores[site.spec.central_index]
    return SharedLinear(site.spec, site.choice, cores, bias=site.bias, bank=site.bank)


def sources(pair: Pair, slots: Any, cache: Any = None) -> Iterator[Any]:
    """Yield the sources of both layers."""
    from mpotrain.engine.megatron.sources import LinearSource

    for site in pair.sites():
        yield LinearSource(
            slots,
            site,
            pair.period,
            bias=f"{site.name}.bias" if site.bias else None,
            central=site.bank,
            adapter=(f"adapter_{site.name}.u", f"adapter_{site.name}.d") if pair.rank else None,
            cache=cache if site.spec is not None else None,
        )


class Parallel(nn.Module):
    """The same two layers, cut over the tensor-parallel ranks."""

    def __init__(
        self,
        pair: Pair,
        config: Any,
        cache: Any = None,
        *,
        skips: bool = False,
        slots: Any = None,
    ) -> None:
        from megatron.core.transformer.spec_utils import build_module

        from mpotrain.engine.megatron.layers import column_linear, row_linear

        super().__init__()
        self.pair = pair
        if slots is None:
            slots = self.slots(pair, [site.bank for site in pair.sites() if site.bank is not None])
        first, second = sources(pair, slots, cache)
        given = {
            "config": config,
            "init_method": None,
            "bias": True,
            "skip_bias_add": skips,
            "is_expert": False,
            "tp_comm_buffer_name": "fc",
            "tp_group": None,
        }
        sizes = pair.hidden, pair.features
        self.first = build_module(
            column_linear(first), sizes[0], pair.blocks * sizes[1], gather_output=False, **given
        )
        self.second = build_module(
            row_linear(second), sizes[1], sizes[0], input_is_parallel=True, **given
        )
        self.bank = slots.bank

    @staticmethod
    def slots(pair: Pair, shared: Collection[str] | None) -> Any:
        """Return the slots of a chunk; `shared` None = everything is."""
        tensors = {name: p.detach() for name, p in Local(pair).named_parameters()}
        return make_slots(tensors, shared=tensors if shared is None else shared)

    @classmethod
    def repeated(cls, pair: Pair, config: Any, cache: Any, *, count: int) -> list[Parallel]:
        """Return pairs that share all of their tensors."""
        slots = cls.slots(pair, None)
        return [cls(pair, config, cache, slots=slots) for _ in range(count)]

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.first(x)
        y = y if bias is None else y + bias
        y, bias = self.second(self.pair.between(y))
        return y if bias is None else y + bias


LENGTH, BATCH = 8, 2
PAIRS = {
    "2 cores, first cut": Pair(mpo((4, 6), (8, 4)), mpo((8, 4), (6, 4)), 32, 32),
    "2 cores, last cut": Pair(mpo((4, 6), (8, 4)), mpo((8, 4), (6, 4)), 32, 4),
    "3 cores, first cut": Pair(mpo((2, 3, 4), (4, 4, 2)), mpo((4, 4, 2), (2, 3, 4)), 32, 32),
    "3 cores, central cut": Pair(mpo((2, 3, 4), (4, 4, 2)), mpo((4, 4, 2), (2, 3, 4)), 32, 8),
    "4 cores, last cut": Pair(mpo((2, 3, 2, 2), (2, 2, 2, 4)), mpo((2, 4, 4), (6, 2, 2)), 32, 4),
    "different modes": Pair(mpo((4, 6), (4, 8)), mpo((16, 2), (2, 12)), 32, 8),
    "part of a mode": Pair(mpo((4, 6), (12, 4)), mpo((4, 4), (6, 4)), 16, 16, blocks=3),
    "part of the last mode": Pair(mpo((4, 6), (4, 12)), mpo((4, 4), (6, 4)), 16, 4, blocks=3),
    "blocks in a mode of their own": Pair(
        mpo((2, 3, 4), (3, 4, 4)), mpo((4, 4), (6, 4)), 16, 16, blocks=3
    ),
    "chains": Pair(
        mpo((2, 3, 4), (4, 4, 2), plan="chain"), mpo((4, 4, 2), (2, 3, 4), plan="chain"), 32, 8
    ),
    "groups": Pair(
        mpo((2, 3, 4), (4, 4, 2), plan="groups"), mpo((4, 4, 2), (2, 3, 4), plan="groups"), 32, 32
    ),
    "exact bonds": Pair(
        mpo((2, 3, 4), (4, 4, 2), cap=10**6), mpo((4, 4, 2), (2, 3, 4), cap=10**6), 32, 32
    ),
    "ttm": Pair(TTMSite(rank=6), TTMSite(rank=6), 32, 32, hidden=16),
    "padded outside": Pair(mpo((2, 3, 4), (4, 4, 2)), mpo((4, 4, 2), (2, 3, 4)), 32, 8, hidden=22),
    "dense": Pair(DenseSite(), DenseSite(), 32, 32),
    "dense blocks by periods": Pair(DenseSite(), DenseSite(), 16, 8, blocks=3),
    "dense, then mpo": Pair(DenseSite(), mpo((4, 4, 2), (2, 3, 4)), 32, 8),
    "no biases": Pair(mpo((4, 6), (8, 4)), mpo((8, 4), (6, 4)), 32, 4, bias=False),
    "shared, a central tensor cut": Pair(
        mpo((2, 3, 4), (4, 4, 2)), mpo((4, 4, 2), (2, 3, 4)), 32, 8, is_shared=True
    ),
    "shared, an auxiliary cut, adapters": Pair(
        mpo((2, 3, 4), (4, 4, 2)), mpo((4, 4, 2), (2, 3, 4)), 32, 32, is_shared=True, rank=3
    ),
    "adapters by periods": Pair(mpo((4, 6), (8, 4)), DenseSite(), 32, 4, rank=3),
    "adapters in blocks": Pair(DenseSite(), mpo((4, 4), (6, 4)), 16, 4, blocks=3, rank=2),
}
LAYOUTS = {
    "tp 1": ParallelConfig(),
    "tp 2": ParallelConfig(tensor=2),
    "tp 2, sp": ParallelConfig(tensor=2, sequence=True),
    "tp 4": ParallelConfig(tensor=4),
    "tp 4, sp": ParallelConfig(tensor=4, sequence=True),
}


def mine(whole: Tensor, parallel: ParallelConfig, rank: int) -> Tensor:
    return whole.chunk(parallel.tensor)[rank].contiguous() if parallel.sequence else whole


def local_run(pair: Pair) -> tuple[Local, Tensor, Tensor]:
    """Return the local layers with their gradients, the output and the input."""
    local = Local(pair)
    x = draw(LENGTH, BATCH, pair.hidden, seed=1).requires_grad_()
    y = local(x)
    (y * draw(*y.shape, seed=2)).sum().backward()
    return local, y.detach(), x
