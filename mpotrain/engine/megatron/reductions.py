"""Sums of gradients that data parallelism does not take: over tensor ranks, and over copies.

The gradient of a replicated tensor of which every tensor-parallel rank sees a part (the cores of an
operator that are not cut, norms under sequence parallelism) is the sum over these ranks. The
gradient of a tensor of which several chunks of the pipeline hold a copy (a central tensor that
layers share, the tied matrix of tokens) is the sum over the copies. Both sums are taken once per
step, after the reduction over data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor, nn

from mpotrain.engine.megatron.groups import Groups
from mpotrain.engine.megatron.placement import placement_of
from mpotrain.parallel.ranks import World


class Reductions:
    """Ends the backward passes of a step: `TransformerConfig.finalize_model_grads_func`."""

    def __init__(self, chunks: Sequence[nn.Module], groups: Groups, world: World) -> None:
        """Find what is partial and what has copies (collective).

        Args:
            chunks: of this rank.
            groups: of this rank.
            world: all ranks.
        """
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        self._groups, self._device = groups, world.device
        self._partial = [p for p in parameters if placement_of(p).is_partial]
        self._copies: dict[str, list[nn.Parameter]] = {}
        for parameter in parameters:
            placement = placement_of(parameter)
            if placement.is_shared:
                self._copies.setdefault(placement.name, []).append(parameter)
        self._shapes, self._stages = self._of_all_stages()

    def __call__(
        self, model: Sequence[Any], num_tokens: Tensor | None = None, **options: Any
    ) -> None:
        """Reduce all gradients; called by the schedule.

        Args:
            model: wrapped chunks.
            num_tokens: counted by the schedule; losses are scaled before the backward pass, so
                nothing is divided here.
            **options: of megatron-core's own function.
        """
        finalize_model_grads(model, None, **options)
        if self._groups.tensor.size() > 1:
            _sum_over([_gradient(p) for p in self._partial], self._groups.tensor)
        self._sum_copies()

    def _of_all_stages(self) -> tuple[dict[str, tuple[int, ...]], dict[str, list[int]]]:
        """Return the shape of every tensor that has copies, and the stages that hold one."""
        own = {name: tuple(copies[0].shape) for name, copies in self._copies.items()}
        everywhere: list[Any] = [None] * self._groups.pipeline.size()
        dist.all_gather_object(everywhere, own, group=self._groups.pipeline)
        shapes = {name: shape for stage in everywhere for name, shape in stage.items()}
        stages = {
            name: [n for n, stage in enumerate(everywhere) if name in stage] for name in shapes
        }
        return shapes, stages

    def _sum_copies(self) -> None:
        for copies in self._copies.values():
            for other in copies[1:]:
                _gradient(copies[0]).add_(_gradient(other))
        last = self._groups.pipeline.size() - 1
        at_ends = [name for name in sorted(self._shapes) if self._stages[name] == [0, last]]
        if self._groups.pipeline.rank() in (0, last):
            # What the first and the last stage share concerns no others.
            self._sum_names(at_ends, parallel_state.get_embedding_group())
        between = [
            name
            for name in sorted(self._shapes)
            if len(self._stages[name]) > 1 and name not in at_ends
        ]
        self._sum_names(between, self._groups.pipeline)
        for copies in self._copies.values():
            for other in copies[1:]:
                _gradient(other).copy_(_gradient(copies[0]))

    def _sum_names(self, names: Sequence[str], group: dist.ProcessGroup) -> None:
        if not names or group.size() == 1:
            return
        gradients = []
        for name in names:
            copies = self._copies.get(name)
            gradients.append(
                torch.zeros(self._shapes[name], device=self._device)
                if copies is None
                else _gradient(copies[0])
            )
        _sum_over(gradients, group)


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def _sum_over(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum gradients over a group in one message, in place."""
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(
        gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))
