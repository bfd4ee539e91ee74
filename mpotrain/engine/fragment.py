"""The part of a parameter whose master weights one rank updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """Part of a parameter whose master weights this rank updates.

    Attributes:
        start: first element, counted in the whole flattened parameter (all experts of it), or in
            what `part` leaves of it.
        numel: number of elements, padding left out.
        flat: vector that the optimizer updates; holds this fragment and others.
        flat_start: first element of the fragment in `flat`.
        part: takes the elements that this rank holds, flattened, out of the whole flattened
            parameter; None where fragments are pieces of the whole one.
    """

    start: int
    numel: int
    flat: Tensor
    flat_start: int
    part: Callable[[Tensor], Tensor] | None = None

    def elements(self, whole: Tensor) -> Tensor:
        """Return the elements (n,) of this fragment of a flattened whole tensor."""
        part = whole if self.part is None else self.part(whole)
        return part.narrow(0, self.start, self.numel)

    def of(self, vector: Tensor) -> Tensor:
        """Return the fragment's view (n,) into a vector laid out like `flat`."""
        return vector.detach().reshape(-1).narrow(0, self.flat_start, self.numel)
