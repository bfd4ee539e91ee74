"""Who is who among the ranks of a world: the grid of parallel degrees (no torch).

Ranks are numbered as megatron-core numbers them (order tp-cp-ep-dp-pp): tensor-parallel ranks are
neighbours, then come context, data and pipeline. The layers of experts have a grid of their own
over the same ranks of a stage: expert-tensor, expert, expert-data.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpotrain.parallel.plan import ParallelConfig

DENSE_AXES = ("tensor", "context", "data", "pipeline")
"""Axes of everything but experts, from the fastest to the slowest."""
EXPERT_AXES = ("expert_tensor", "expert", "expert_data", "pipeline")
"""Axes of experts, from the fastest to the slowest."""


@dataclass(frozen=True)
class RankGrid:
    """Sizes of all axes.

    Attributes:
        tensor: tp.
        context: cp.
        data: dp, ranks that meet different samples.
        pipeline: pp.
        expert_tensor: etp.
        expert: ep.
        expert_data: ranks of a stage that hold the same experts.
    """

    tensor: int
    context: int
    data: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.context * self.data * self.pipeline

    def coordinates(self, rank: int, axes: tuple[str, ...] = DENSE_AXES) -> dict[str, int]:
        """Return the place of a rank on each axis."""
        found = {}
        for axis in axes:
            size: int = getattr(self, axis)
            found[axis], rank = rank % size, rank // size
        return found

    def group(self, rank: int, axis: str) -> list[int]:
        """Return the ranks that differ from `rank` on one axis alone, itself included."""
        axes = DENSE_AXES if axis in DENSE_AXES else EXPERT_AXES
        own = self.coordinates(rank, axes)
        others = [key for key in axes if key != axis]
        return [
            other
            for other in range(self.world_size)
            if all(self.coordinates(other, axes)[key] == own[key] for key in others)
        ]


def rank_grid(parallel: ParallelConfig, world_size: int) -> RankGrid | None:
    """Return the grid of a world; None where the degrees do not divide it.

    Args:
        parallel: the degrees.
        world_size: number of processes.
    """
    experts = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if world_size % parallel.model_ranks or world_size % experts:
        return None
    return RankGrid(
        tensor=parallel.tensor,
        context=parallel.context,
        data=world_size // parallel.model_ranks,
        pipeline=parallel.pipeline,
        expert_tensor=parallel.expert_tensor,
        expert=parallel.expert,
        expert_data=world_size // experts,
    )


def grid_text(grid: RankGrid) -> str:
    """Describe a grid in one line: the axes of more than one rank, experts apart."""

    def product(axes: tuple[str, ...]) -> str:
        sizes = {axis.replace("_", " "): getattr(grid, axis) for axis in axes}
        return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"

    text = f"{grid.world_size} ranks = {product(DENSE_AXES)}"
    if grid.expert * grid.expert_tensor == 1:
        return text
    return f"{text}; of experts {product(EXPERT_AXES)}"
