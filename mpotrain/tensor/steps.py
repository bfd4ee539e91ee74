"""The steps of a chain: when a group of cores meets the input, and as what (torch-free)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.tree import Range

Direction = Literal["lr", "rl"]
"""Order in which the input meets the groups: from the left or from the right."""

Order = tuple[int, ...]

STANDARD: Order = (0, 1, 2, 3, 4)
"""Axes of a state in the order of `ChainStep.axes`."""

# The two ways of bringing the third block of axes before the second one.
_LAST_FIRST: Order = (0, 3, 4, 1, 2)
_MIDDLE_LAST: Order = (0, 1, 4, 2, 3)


@dataclass(frozen=True)
class ChainStep:
    """One step of a chain: the tokens' state times the matrix of one group of cores.

    The incoming state has five axes (the first one for each token). They are read in two ways: as
    what the step before has produced, (outer, rows, width), and as what this step needs,
    (outer, inner, width). From the left they are (j_1..j_{k-1}, j_k, d, i_{k+1}, i_{k+2}..i_n),
    from the right (i_1..i_{k-1}, i_k, d, j_{k+1}, j_{k+2}..j_n).

    The product is done in one of two layouts: *batched*, a (rows, inner) matrix times many
    (inner, width) slices, without any reordering; or *folded*, one large (outer * width, inner)
    times (inner, rows) product, for which the width is brought to the front.

    Attributes:
        group: first and last core of the group.
        direction: of the chain.
        axes: sizes of the five axes of the incoming state.
        outer: modes to the left that the step does not touch, for each token.
        inner: contracted size (in modes of the group times the incoming bond).
        rows: produced size (out modes of the group times the outgoing bond).
        width: modes to the right that the step does not touch.
        batched: the layout.
    """

    group: Range
    direction: Direction
    axes: tuple[int, int, int, int, int]
    outer: int
    inner: int
    rows: int
    width: int
    batched: bool = False

    @property
    def state_size(self) -> int:
        """Elements of the incoming state for each token."""
        return self.outer * self.inner * self.width

    @property
    def entry_order(self) -> Order:
        """Order of the axes in which this step reads its incoming state."""
        if self.batched:
            return STANDARD
        return _MIDDLE_LAST if self.direction == "lr" else _LAST_FIRST

    @property
    def exit_order(self) -> Order:
        """Order, in the axes of the next step, in which this step leaves its outgoing state."""
        if self.batched:
            return STANDARD
        return _LAST_FIRST if self.direction == "lr" else _MIDDLE_LAST


def needs_copy(held: Order, wanted: Order, axes: Sequence[int]) -> bool:
    """Return whether axes must be reordered in memory; axes of size 1 do not matter."""
    return [a for a in held if axes[a] > 1] != [a for a in wanted if axes[a] > 1]


def chain_steps(
    spec: MPOSpec, groups: tuple[Range, ...], direction: Direction
) -> tuple[ChainStep, ...]:
    """Return the steps of contracting x with groups of cores, in order of execution.

    Args:
        spec: the cores.
        groups: contiguous ranges that cover all cores from left to right.
        direction: "lr" begins with the first group, "rl" with the last.
    """
    d = spec.all_bonds
    i = [math.prod(spec.in_modes[a : b + 1]) for a, b in groups]
    j = [math.prod(spec.out_modes[a : b + 1]) for a, b in groups]
    steps = []
    for g, (first, last) in enumerate(groups):
        left, right = d[first], d[last + 1]
        if direction == "lr":
            outer, width = math.prod(j[:g]), math.prod(i[g + 1 :])
            produced = j[g - 1] if g > 0 else 1
            axes = (outer // produced, produced, left, i[g], width)
            inner, rows = left * i[g], j[g] * right
        else:
            outer, width = math.prod(i[:g]), math.prod(j[g + 1 :])
            produced = j[g + 1] if g + 1 < len(groups) else 1
            axes = (outer, i[g], right, produced, width // produced)
            inner, rows = i[g] * right, left * j[g]
        steps.append(ChainStep((first, last), direction, axes, outer, inner, rows, width))
    return tuple(steps) if direction == "lr" else tuple(reversed(steps))
