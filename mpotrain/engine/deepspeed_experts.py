"""Expert parallelism under DeepSpeed: who holds which experts, and what DeepSpeed is told.

DeepSpeed reduces a gradient over the ranks that hold the same experts if the parameter carries
`allreduce = False` and the name of its groups, if its optimizer group says `moe`, and if the model
contains a `deepspeed.moe.layer.MoE`. The first two are set here from what our layers say of
themselves; the third is an empty marker, because routing and exchange are our own. Rank r of a
world with expert-parallel degree p is number r mod p of its group of p consecutive ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mpotrain.errors import ParallelError
from mpotrain.nn.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.roles import experts_of
from mpotrain.parallel.ranks import World


class ExpertShards:
    """Cuts the experts of a model over `degree` ranks and hands the cut to DeepSpeed.

    Attributes:
        degree: ranks over which the experts of a mixture are spread.
        rank: this rank's number among them.
    """

    def __init__(self, model: nn.Module, degree: int, world: World) -> None:
        """Look at the model; nothing is cut yet.

        Args:
            model: the bare model with all experts.
            degree: divides the world and the experts of every mixture.
            world: the ranks.

        Raises:
            ParallelError: the degree divides the world or the experts of a mixture not.
        """
        self.degree, self.rank = degree, world.rank % degree
        self._model = model
        if world.size % degree:
            raise ParallelError(
                f"parallel.expert: {degree} does not divide the world of {world.size}"
            )
        for name, parameter in self._split_parameters():
            if experts_of(parameter) % degree:
                raise ParallelError(
                    f"parallel.expert: {degree} does not divide the {experts_of(parameter)} "
                    f"experts of {name}"
                )

    @property
    def group_name(self) -> str:
        """Name of DeepSpeed's process groups for this degree."""
        return f"ep_size_{self.degree}"

    def cut(self) -> None:
        """Keep the rows of this rank's experts alone (no effect with degree 1)."""
        if self.degree == 1:
            return
        for _, parameter in self._split_parameters():
            local = parameter.shape[0] // self.degree
            rows = parameter.data[self.rank * local : (self.rank + 1) * local]
            parameter.data = rows.clone(memory_format=torch.contiguous_format)

    def offset(self, parameter: nn.Parameter) -> int:
        """Return where this rank's rows begin in the whole flattened parameter.

        Args:
            parameter: a parameter of the model, already cut.
        """
        if self.degree == 1 or not experts_of(parameter):
            return 0
        return self.rank * parameter.numel()

    def mark(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell DeepSpeed which parameters and optimizer groups belong to experts."""
        if self.degree == 1:
            return
        for _, parameter in self._split_parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.group_name  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            if group.get("experts"):
                # DeepSpeed finds the process group of an optimizer group by its name.
                group["moe"], group["name"] = True, self.group_name

    def marker(self, deepspeed: ModuleType) -> nn.Module | None:
        """Return the empty module by which DeepSpeed sees experts; None with degree 1."""
        if self.degree == 1:
            return None
        from deepspeed.moe.layer import MoE
        from deepspeed.utils import groups

        name, degree = self.group_name, self.degree
        # Groups of an earlier engine may belong to a process group that is gone.
        forget_groups(groups, name)

        class Marker(MoE):  # type: ignore[misc]
            """Announces experts and makes their process groups; has no parameters."""

            def __init__(self) -> None:
                nn.Module.__init__(self)
                self.num_experts = degree

            def set_deepspeed_parallelism(
                self, use_data_before_expert_parallel_: bool = False
            ) -> None:
                if name not in groups._get_expert_parallel_group_dict():
                    groups._create_expert_and_data_parallel(degree)

        return Marker()

    def connect(self) -> None:
        """Let every mixture exchange tokens with the ranks that hold the other experts."""
        if self.degree == 1:
            return
        from deepspeed.utils import groups

        group: dist.ProcessGroup = groups._get_expert_parallel_group(self.group_name)
        for module in self._model.modules():
            if isinstance(module, MixtureOfExperts):
                module.dispatcher = AllToAllDispatcher(module.router.num_experts, group)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Give every rank all experts inside the block (collective), and its own ones back after.

        Inside, mixtures compute alone: nothing travels.
        """
        if self.degree == 1:
            yield
            return
        from deepspeed.utils import groups

        group: dist.ProcessGroup = groups._get_expert_parallel_group(self.group_name)
        own = [(parameter, parameter.data) for _, parameter in self._split_parameters()]
        mixtures = [m for m in self._model.modules() if isinstance(m, MixtureOfExperts)]
        dispatchers = [mixture.dispatcher for mixture in mixtures]
        for parameter, rows in own:
            parts = [torch.empty_like(rows) for _ in range(self.degree)]
            dist.all_gather(parts, rows.contiguous(), group=group)
            parameter.data = torch.cat(parts)
        for mixture in mixtures:
            mixture.dispatcher = LocalDispatcher(mixture.router.num_experts)
        try:
            yield
        finally:
            for parameter, rows in own:
                parameter.data = rows
            for mixture, dispatcher in zip(mixtures, dispatchers, strict=True):
                mixture.dispatcher = dispatcher

    def close(self) -> None:
        """Drop DeepSpeed's process groups."""
        if self.degree > 1:
            from deepspeed.utils import groups

            forget_groups(groups, self.group_name)

    def _split_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if experts_of(p)]


def forget_groups(groups: Any, name: str) -> None:
    """Take the process groups of a degree out of DeepSpeed's tables.

    Args:
        groups: the module `deepspeed.utils.groups`.
        name: name of the groups.
    """
    for table in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        table.pop(name, None)
