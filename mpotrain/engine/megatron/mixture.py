"""A mixture of experts in megatron-core's layer: router, dispatcher, experts and the way back."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from mpotrain.engine.megatron.experts import Experts
from mpotrain.engine.megatron.micro import Micro
from mpotrain.engine.megatron.routing import LogicalRouter
from mpotrain.engine.megatron.sources import MixtureSource


class MixtureLayer(MoELayer):  # type: ignore[misc]
    """`mpotrain.nn.moe.mixture.MixtureOfExperts`, its experts spread over ranks.

    Tokens travel by megatron-core's dispatchers, which also add up what the expert-tensor ranks of
    an expert compute.

    Attributes:
        router: a `LogicalRouter`.
        experts: an `Experts`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        source: MixtureSource,
        **_: Any,
    ) -> None:
        """Build the layer; see `mixture_layer`.

        Args:
            config: of megatron-core.
            submodules: left to this class.
            layer_number: number of the layer, from 1.
            pg_collection: process groups; None = those of the world.
            source: the mixture.
        """
        groups = get_default_pg_collection() if pg_collection is None else pg_collection
        parts = MoESubmodules(
            experts=ModuleSpec(Experts, params={"source": source}),
            router=partial(LogicalRouter, source=source),
        )
        super().__init__(config, parts, layer_number, groups)
        self._top_k: int = source.moe.router.top_k
        self._feature_ranks: int = groups.expt_tp.size()

    def forward(self, x: Tensor, micro: Micro | None = None, **_: Any) -> tuple[Tensor, None]:
        """Map x (s, b, H) to (s, b, H).

        Args:
            x: this rank's tokens.
            micro: takes the statistics and weighs the auxiliary loss; None = neither.

        Returns:
            The result, and no bias.
        """
        gates, works = self.router(x, micro)
        rows, gates = self.dispatch(*self.preprocess(x, gates, works))
        rows, counts, gates = self.token_dispatcher.dispatch_postprocess(rows, gates)
        # With even loads every rank works on as many rows as it sends, times the ranks that share
        # the features of an expert and therefore work on each other's rows.
        nominal_rows = x.shape[0] * x.shape[1] * self._top_k * self._feature_ranks
        rows, _none = self.experts(rows, counts, gates, nominal_rows)
        y = self.postprocess(self.combine(self.token_dispatcher.combine_preprocess(rows)), None)
        self._let_go()
        return y, None

    def _let_go(self) -> None:
        """Take the gates of this pass from the dispatcher, which would keep them until the next.

        They hold the graph of the pass, and that holds the layer: nothing would ever be freed.
        """
        dispatcher = self.token_dispatcher
        for name, value in vars(dispatcher).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(dispatcher, name, None)


def mixture_layer(source: MixtureSource) -> ModuleSpec:
    """Return what builds a mixture in the place of a transformer layer's feed-forward layer."""
    return ModuleSpec(MixtureLayer, params={"source": source})
