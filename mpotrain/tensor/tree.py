"""In which order neighbouring cores are multiplied, and what that costs (torch-free).

Cores are kept as ``(d_{k-1}, i_k * j_k, d_k)``; merging two neighbouring ranges of cores is then
one matrix product without any permutation. The cheapest order is found by the classical
dynamic programme for matrix chains. It does not depend on the number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from mpotrain.tensor.spec import MPOSpec

Range = tuple[int, int]
"""First and last core (inclusive) of a run of neighbouring cores."""


@dataclass(frozen=True)
class Merge:
    """One product: the cores first..split times the cores split+1..last.

    Attributes:
        first: first core of the left factor.
        split: last core of the left factor.
        last: last core of the right factor.
    """

    first: int
    split: int
    last: int

    @property
    def left(self) -> Range:
        """Range of the left factor."""
        return (self.first, self.split)

    @property
    def right(self) -> Range:
        """Range of the right factor."""
        return (self.split + 1, self.last)

    @property
    def result(self) -> Range:
        """Range of the product."""
        return (self.first, self.last)


def merged_modes(spec: MPOSpec, first: int, last: int) -> int:
    """Return prod i_k * j_k over the cores first..last."""
    cores = slice(first, last + 1)
    return math.prod(spec.in_modes[cores]) * math.prod(spec.out_modes[cores])


def merged_size(spec: MPOSpec, cores: Range) -> int:
    """Return the number of elements of the product of a range of cores."""
    d = spec.all_bonds
    return d[cores[0]] * merged_modes(spec, *cores) * d[cores[1] + 1]


def merge_shape(spec: MPOSpec, merge: Merge) -> tuple[int, int, int]:
    """Return rows, columns and inner size (m, n, k) of the matrix product of a merge."""
    d = spec.all_bonds
    return (
        d[merge.first] * merged_modes(spec, *merge.left),
        merged_modes(spec, *merge.right) * d[merge.last + 1],
        d[merge.split + 1],
    )


@lru_cache(maxsize=4096)
def merge_order(spec: MPOSpec, first: int, last: int) -> tuple[Merge, ...]:
    """Return the cheapest order of merging the cores first..last.

    Args:
        spec: the cores.
        first: first core.
        last: last core, inclusive.

    Returns:
        The merges in an order in which factors precede products; none for a single core. Of
        orders with equal FLOPs the one with the leftmost split is taken.
    """
    best: dict[Range, tuple[int, int]] = {(k, k): (0, k) for k in range(first, last + 1)}
    for length in range(1, last - first + 1):
        for start in range(first, last - length + 1):
            end = start + length
            best[start, end] = min(
                (
                    best[start, split][0]
                    + best[split + 1, end][0]
                    + 2 * math.prod(merge_shape(spec, Merge(start, split, end))),
                    split,
                )
                for split in range(start, end)
            )

    def walk(start: int, end: int) -> tuple[Merge, ...]:
        if start == end:
            return ()
        split = best[start, end][1]
        return (*walk(start, split), *walk(split + 1, end), Merge(start, split, end))

    return walk(first, last)


def merge_flops(spec: MPOSpec, merges: tuple[Merge, ...]) -> int:
    """Return the FLOPs (2 m n k each) of a sequence of merges."""
    return sum(2 * math.prod(merge_shape(spec, merge)) for merge in merges)
