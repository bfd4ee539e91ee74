"""The router of a mixture whose micro-batch is spread over ranks.

With sequence or context parallelism a rank holds some tokens of a micro-batch. Each token is routed
where it is; what is a mean over the micro-batch (losses, statistics) is added up over the ranks
first, so that it does not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpotrain.engine.megatron.micro import Micro
from mpotrain.engine.megatron.rank_sums import sum_over_ranks
from mpotrain.engine.megatron.slots import LogicalModule
from mpotrain.engine.megatron.sources import MixtureSource
from mpotrain.errors import ParallelError
from mpotrain.nn.moe.config import RouterConfig
from mpotrain.nn.moe.router import ExpertChoice
from mpotrain.nn.moe.token_sums import TokenSums


class LogicalRouter(ExpertChoice, LogicalModule):
    """`mpotrain.nn.moe.router.Router` as a router of megatron-core's mixtures."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        source: MixtureSource,
    ) -> None:
        """Make weights and selection biases.

        Args:
            config: of megatron-core.
            pg_collection: groups `tp`, `cp` and `tp_cp`.
            source: the mixture.

        Raises:
            ParallelError: tokens are the same on all tensor-parallel ranks, or tokens of one
                micro-batch on several ranks would compete for the places of an expert.
        """
        super().__init__(source.moe.num_experts, source.moe.router)
        self.name = source.name
        splits_tokens = pg_collection.tp.size() > 1
        if splits_tokens and not config.sequence_parallel:
            raise ParallelError(
                f"{source.name}: a mixture under parallel.tensor={pg_collection.tp.size()} wants "
                "every token on one rank; set parallel.sequence=true"
            )
        self._sharing: dist.ProcessGroup = pg_collection.tp_cp
        if self._sharing.size() > 1:
            _refuse_capacity(source.name, source.moe.router, self._sharing.size())
        for leaf in ("weight", "bias") if source.router.bias else ("weight",):
            name = f"{source.router.name}.{leaf}"
            source.slots.add(self, leaf, name, is_partial=splits_tokens)
        if self.balance is not None:
            self.balance = self.balance.to(self.read("weight").device)

    def forward(self, hidden: Tensor, micro: Micro | None = None) -> tuple[Tensor, Tensor]:
        """Choose the experts of tokens.

        Args:
            hidden: tokens (s, b, H).
            micro: takes the statistics, and says what the auxiliary loss weighs; None = neither.

        Returns:
            The factor of each expert for each token, fp32 (s b, E), zero where it is not chosen,
            to whose gradient the auxiliary loss adds its own; which experts work on the token,
            bool (s b, E).
        """
        bias = self.read("bias") if self.owns("bias") else None
        scores = self.score(hidden, self.read("weight"), bias)
        length, batch, experts = scores.shape
        # Samples one after the other, as in one process: capacity depends on the order.
        routing = self.route(scores.transpose(0, 1).reshape(-1, experts))
        gates = scores.new_zeros(batch * length, experts).scatter(1, routing.experts, routing.gates)
        kept = torch.ones_like(routing.experts, dtype=torch.bool)
        if routing.kept is not None:
            kept = routing.kept
        works = torch.zeros_like(gates, dtype=torch.bool).scatter(1, routing.experts, kept)
        if micro is not None:
            micro.tally.add(self.name, routing.statistics)
            if routing.auxiliary_loss.requires_grad:
                gates = attach_loss(gates, routing.auxiliary_loss, micro.auxiliary_scale)
        gates, works = (
            table.view(batch, length, experts).transpose(0, 1).reshape(-1, experts)
            for table in (gates, works)
        )
        return gates, works

    def set_layer_number(self, layer_number: int) -> None:
        """Take no notice of the number that megatron-core gives the layer."""

    def extra_repr(self) -> str:
        """Describe the router in `print(model)`."""
        return f"top {self.config.top_k} of {self.num_experts}"

    def _of_micro_batch(self, sums: TokenSums) -> TokenSums:
        if self._sharing.size() == 1:
            return sums
        return sums.over_ranks(lambda vector: sum_over_ranks(vector, self._sharing))


def _refuse_capacity(name: str, router: RouterConfig, ranks: int) -> None:
    for key in ("capacity_factor", "eval_capacity_factor"):
        if getattr(router, key) is not None:
            raise ParallelError(
                f"{name}: moe.router.{key} drops the last tokens of a micro-batch, but its tokens "
                f"are spread over {ranks} ranks (parallel.tensor, parallel.context); leave {key} "
                "out, or use data, pipeline and expert parallelism alone"
            )


class _AttachLoss(torch.autograd.Function):
    """The value itself; its backward pass is also that of a loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(loss)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (loss,) = ctx.saved_tensors
        return gradient, torch.full_like(loss, ctx.weight), None


attach_loss: Callable[..., Tensor] = _AttachLoss.apply
"""Return `value` such that its backward pass starts that of a loss: (value, loss, weight)."""
