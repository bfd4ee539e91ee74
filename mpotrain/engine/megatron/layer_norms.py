"""Norms of whole layers for LAMB where a tensor is cut over tensor-parallel ranks.

Without the distributed optimizer every rank updates all elements that it holds, so a layer is on
the ranks of one tensor-parallel (or expert-tensor) group. These ranks hold the same list of
parameters and ask for the norms in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mpotrain.engine.megatron.groups import Groups
from mpotrain.engine.megatron.masters import Master


class CutLayers:
    """Layers in the parameters of one rank; see `mpotrain.engine.layerwise.Layers`.

    A layer is a logical tensor; one with a row for each expert is as many layers as the rank holds
    experts.
    """

    def __init__(self, masters: Iterable[Master], groups: Groups) -> None:
        """Find out what is cut.

        Args:
            masters: of an optimizer that is not split over data-parallel ranks.
            groups: of this rank.
        """
        # The tensor is kept: an id is good for as long as its object lives.
        self._layers: dict[int, tuple[Tensor, int, dist.ProcessGroup | None]] = {}
        for master in masters:
            placement = master.placement
            count = placement.local_shape[0] if placement.num_experts else 1
            group = groups.expert_tensor if placement.is_expert else groups.tensor
            is_cut = groups.cuts_elements(placement)
            self._layers[id(master.main)] = (master.main, count, group if is_cut else None)

    def squares(self, flat: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Sum the squares of every layer over the ranks that hold parts of it (collective)."""
        _, count, group = self._layers[id(flat)]
        rows = [vector.detach().reshape(count, -1) for vector in vectors]
        norms = [torch.linalg.vector_norm(row, dim=1, dtype=torch.float64) for row in rows]
        sums = torch.stack(norms).square()
        if group is not None:
            dist.all_reduce(sums, group=group)
        return sums

    def scale_(self, flat: Tensor, vector: Tensor, factors: Tensor) -> None:
        """Multiply the elements of every layer by its factor, in place."""
        _, count, _ = self._layers[id(flat)]
        rows = vector.view(count, -1)
        rows.mul_(factors.to(rows.dtype).unsqueeze(1))
