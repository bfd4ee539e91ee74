"""Norms of whole layers for optimizers that need them, wherever ZeRO has put the pieces.

LARS and LAMB take a norm for each layer. ZeRO shows an optimizer flat vectors that hold pieces of
many parameters, or a part of one, and the norm of such a vector means nothing. A `LayerMap` knows
which elements of which vector belong to which layer; it sums squares over pieces and ranks.

A layer is a logical parameter. One with a row for each expert is as many layers as there are
experts: an expert's matrix is the same layer however experts are stacked or spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mpotrain.engine.fragment import Fragment
from mpotrain.errors import ParallelError
from mpotrain.nn.roles import experts_of
from mpotrain.parallel.ranks import World


class Layers(Protocol):
    """Which elements of the vectors that an optimizer updates form a layer."""

    def squares(self, flat: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Sum the squares of every layer over all ranks (collective).

        Args:
            flat: what the optimizer updates.
            vectors: V tensors laid out like `flat`.

        Returns:
            Sums of the L layers of `flat`, float64 (V, L) where `flat` is.
        """
        ...

    def scale_(self, flat: Tensor, vector: Tensor, factors: Tensor) -> None:
        """Multiply the elements of every layer by its factor, in place.

        Args:
            flat: what the optimizer updates.
            vector: laid out like `flat`.
            factors: one for each layer of `flat` (L,).
        """
        ...


@runtime_checkable
class Layerwise(Protocol):
    """An optimizer whose update of an element depends on the whole layer."""

    def use_layers(self, layers: Layers) -> None:
        """Take norms by `layers` from now on."""
        ...


class WholeTensors:
    """Every tensor that the optimizer updates is one layer: what holds without an engine."""

    def squares(self, flat: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Return the squares of whole vectors; see `Layers.squares`."""
        return torch.stack(_norms(vectors)).square().unsqueeze(1)

    def scale_(self, flat: Tensor, vector: Tensor, factors: Tensor) -> None:
        """Scale the whole vector; see `Layers.scale_`."""
        vector.mul_(factors[0])


@dataclass(frozen=True)
class Piece:
    """Elements of one layer in a flat vector.

    Attributes:
        layer: number of the layer.
        start: first element in the vector.
        numel: number of elements.
    """

    layer: int
    start: int
    numel: int

    def of(self, vector: Tensor) -> Tensor:
        """Return the piece's view (n,) into a vector."""
        return vector.view(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class _FlatLayers:
    """Layers of one flat vector: how many on all ranks together, and this rank's pieces of them."""

    flat: Tensor
    num_layers: int
    pieces: tuple[Piece, ...]
    rows: Tensor


class LayerMap:
    """Layers in the flat vectors of one rank.

    A layer may begin on one rank and end on another. Sums are taken in float64, so that they
    hardly depend on where it is cut.
    """

    def __init__(
        self,
        flats: Iterable[tuple[Tensor, int, Sequence[Piece]]],
        over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        """Take over a finished map; see `map_layers`.

        Args:
            flats: vectors in the same order on all ranks; with each the number of its layers on all
                ranks together, and this rank's pieces, numbered below that.
            over_ranks: sums a tensor over the ranks that hold other pieces.
        """
        # The tensor is kept: an id is good for as long as its object lives.
        self._flats = {
            id(flat): _FlatLayers(
                flat,
                num_layers,
                tuple(pieces),
                torch.tensor([p.layer for p in pieces], dtype=torch.int64, device=flat.device),
            )
            for flat, num_layers, pieces in flats
        }
        self._over_ranks = over_ranks

    def squares(self, flat: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Sum the squares of every layer over pieces and ranks; see `Layers.squares`."""
        layers = self._flats[id(flat)]
        shape = (len(vectors), layers.num_layers)
        sums = torch.zeros(shape, dtype=torch.float64, device=flat.device)
        if layers.pieces:
            norms = _norms([piece.of(vector) for vector in vectors for piece in layers.pieces])
            sums[:, layers.rows] = torch.stack(norms).square().view(len(vectors), -1)
        return self._over_ranks(sums).to(flat.device)

    def scale_(self, flat: Tensor, vector: Tensor, factors: Tensor) -> None:
        """Scale this rank's pieces; see `Layers.scale_`."""
        layers = self._flats[id(flat)]
        for piece, factor in zip(layers.pieces, factors[layers.rows].unbind(), strict=True):
            piece.of(vector).mul_(factor)


def map_layers(
    flats: Sequence[Tensor],
    parameters: Mapping[str, nn.Parameter],
    shapes: Mapping[str, tuple[int, ...]],
    fragment_of: Callable[[str], Fragment | None],
    world: World,
    *,
    shared: bool,
) -> LayerMap:
    """Find the layers of a model in what the optimizer updates (collective).

    Args:
        flats: vectors that the optimizer updates, in the same order on all ranks.
        parameters: parameters by logical name.
        shapes: their whole shapes, all experts included.
        fragment_of: this rank's part of a parameter by logical name.
        world: the ranks.
        shared: whether every rank holds everything.

    Raises:
        ParallelError: the ranks together do not hold every element of a layer once.
    """
    places = {id(flat): number for number, flat in enumerate(flats)}
    found: list[list[Piece]] = [[] for _ in flats]
    names: list[str] = []
    sizes: list[int] = []
    for name, parameter in parameters.items():
        num_layers = max(experts_of(parameter), 1)
        size = prod(shapes[name]) // num_layers
        fragment = fragment_of(name)
        if fragment is not None:
            found[places[id(fragment.flat)]] += _cut(fragment, size, first=len(sizes))
        names += [name] * num_layers
        sizes += [size] * num_layers
    own = [[(piece.layer, piece.numel) for piece in pieces] for pieces in found]
    held = [own] if shared else world.gather_objects(own)
    _check_cover(held, names, sizes)
    entries = []
    for place, (flat, pieces) in enumerate(zip(flats, found, strict=True)):
        # Numbers within this vector, the same on every rank whatever pieces it has.
        members = sorted({layer for rank in held for layer, _ in rank[place]})
        rows = {layer: row for row, layer in enumerate(members)}
        local = [Piece(rows[piece.layer], piece.start, piece.numel) for piece in pieces]
        entries.append((flat, len(members), local))

    def over_ranks(sums: Tensor) -> Tensor:
        return sums if shared else world.all_reduce_sum(sums.to(world.device))

    return LayerMap(entries, over_ranks)


def _check_cover(
    held: Sequence[Sequence[Sequence[tuple[int, int]]]],
    names: Sequence[str],
    sizes: Sequence[int],
) -> None:
    """Hold what all ranks have together against the model.

    Args:
        held: for each rank and each of its vectors, layers and how many elements of them it has.
        names: parameter of each layer.
        sizes: elements of each layer.

    Raises:
        ParallelError: they have other numbers of elements.
    """
    counts = [0] * len(sizes)
    for rank in held:
        for flat in rank:
            for layer, numel in flat:
                counts[layer] += numel
    wrong = sorted({n for n, size, c in zip(names, sizes, counts, strict=True) if size != c})
    if wrong:
        raise ParallelError(
            f"{', '.join(wrong)}: the ranks together do not hold every element once, so no norm of "
            "whole layers can be taken; LAMB does not work in this layout, use AdamW"
        )


def _cut(fragment: Fragment, size: int, first: int) -> list[Piece]:
    """Cut a fragment where the layers of its parameter end.

    Args:
        fragment: part of a parameter.
        size: elements of each of its layers.
        first: number of the first of its layers.
    """
    pieces = []
    start, end = fragment.start, fragment.start + fragment.numel
    while start < end:
        layer = start // size
        stop = min(end, (layer + 1) * size)
        at = fragment.flat_start + start - fragment.start
        pieces.append(Piece(first + layer, at, stop - start))
        start = stop
    return pieces


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return L2 norms, each a float64 scalar; one kernel for many tensors on CUDA."""
    return list(torch._foreach_norm(list(tensors), 2, dtype=torch.float64))
