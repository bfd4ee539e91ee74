"""How the features between two layers are cut over tensor-parallel ranks (no torch).

A column-parallel layer computes some of its output features, and the row-parallel layer behind it
takes those and no others. Both must mean the same features. Here features are cut in periods: of
every `period` consecutive features rank r of p holds the r-th part. With a period of all features
this is the usual cut into contiguous blocks. A matrix product operator is cut by cutting one mode
of one core; a mode of size m = u v with n features below it offers the periods v n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from mpotrain.tensor.spec import MPOSpec

Side = Literal["in", "out"]


@dataclass(frozen=True)
class ModeCut:
    """The mode of a core that is cut.

    Attributes:
        core: number of the core.
        period: how many consecutive values of the mode are shared out; divides the mode.
    """

    core: int
    period: int


@dataclass(frozen=True)
class Face:
    """The features of one matrix on the side where it is cut.

    Attributes:
        name: of the site, for messages.
        features: number of features.
        spec: operator of the matrix; None for a dense one.
        side: which side of the operator is cut.
        span: a period divides it; below `features` where several blocks of features are cut alike
            (queries, keys and values of one matrix).
    """

    name: str
    features: int
    spec: MPOSpec | None
    side: Side
    span: int

    def modes(self) -> tuple[int, ...]:
        """Return the modes of the side that is cut; () for a dense matrix."""
        if self.spec is None:
            return ()
        return self.spec.in_modes if self.side == "in" else self.spec.out_modes

    def is_padded(self) -> bool:
        """Whether the operator has more rows or columns on this side than features."""
        return self.spec is not None and prod(self.modes()) != self.features

    def cut(self, period: int, parts: int) -> ModeCut | None:
        """Return the mode whose cut into `parts` is the period; None where there is none."""
        below = prod(self.modes())
        for core, mode in enumerate(self.modes()):
            below //= mode
            values = period // below
            if period % below == 0 and 1 <= values <= mode:
                if values == 1 < parts:
                    continue  # all values of the next core's mode
                fits = mode % values == 0 and values % parts == 0
                return ModeCut(core, values) if fits else None
        return None

    def periods(self, parts: int) -> set[int]:
        """Return all periods that this matrix can be cut by."""
        if self.is_padded():
            return set()
        if self.spec is None:
            candidates: Iterable[int] = _divisors(self.span)
            return {period for period in candidates if period % parts == 0}
        return {
            period
            for period in _divisors(self.span)
            if period % parts == 0 and self.cut(period, parts) is not None
        }


def common_periods(faces: Sequence[Face], parts: int, unit: int = 1) -> list[int]:
    """Return the periods by which all matrices around some features can be cut, largest first.

    Args:
        faces: sides of matrices that meet at the same features.
        parts: tensor-parallel ranks.
        unit: features that stay together on a rank (those of a head).
    """
    common = set.intersection(*(face.periods(parts) for face in faces))
    return sorted((p for p in common if (p // parts) % unit == 0), reverse=True)


def choose_period(faces: Sequence[Face], parts: int, unit: int = 1) -> int | None:
    """Return the period that cuts most parameters; None where there is no common one.

    The larger the core that is cut, the less of the operator is held, rebuilt and reduced by every
    rank. Of equally good periods the largest is taken.

    Args:
        faces: sides of matrices that meet at the same features.
        parts: tensor-parallel ranks; 1 cuts nothing.
        unit: features that stay together on a rank.
    """
    if parts == 1:
        return faces[0].span

    def weight(period: int) -> int:
        return sum(_cut_elements(face, period, parts) for face in faces)

    periods = common_periods(faces, parts, unit)
    return max(periods, key=lambda period: (weight(period), period), default=None)


def _cut_elements(face: Face, period: int, parts: int) -> int:
    if face.spec is None:
        return 0
    cut = face.cut(period, parts)
    return 0 if cut is None else prod(face.spec.core_shapes[cut.core])


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
