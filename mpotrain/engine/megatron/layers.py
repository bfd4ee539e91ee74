"""Linear layers whose features are cut over tensor-parallel ranks, for Megatron-core's modules.

They take the places of Megatron-core's `ColumnParallelLinear` and `RowParallelLinear` (Shoeybi et
al. 2019, arXiv 1909.08053, section 3; with sequence parallelism Korthikanti et al. 2022, arXiv
2205.05198, section 4.2) and communicate as these do; the matrix is dense or an operator. A low-rank
addition U D runs along: a column-parallel layer cuts D, a row-parallel one U. The other factor is
held whole, and each rank's gradient of it is a part of the sum, as it is for cores: x U D is summed
over the ranks' columns of D, or over their rows of U.
"""

from __future__ import annotations

from typing import Any, NoReturn

from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from mpotrain.engine.megatron.entry import Entered
from mpotrain.engine.megatron.matrices import RankSide, rank_matrix
from mpotrain.engine.megatron.periods import Side
from mpotrain.engine.megatron.slots import LogicalModule
from mpotrain.engine.megatron.sources import LinearSource

Output = tuple[Tensor, Tensor | None]
"""What Megatron-core's linear layers return: y, and the bias where the caller is to add it."""


def column_linear(source: LinearSource) -> ModuleSpec:
    """Return the specification of a layer that computes the rank's part of the out features."""
    return ModuleSpec(ColumnLinear, params={"source": source})


def row_linear(source: LinearSource) -> ModuleSpec:
    """Return the specification of a layer that takes the rank's part of the in features."""
    return ModuleSpec(RowLinear, params={"source": source})


class ParallelLinear(LogicalModule):
    """What both kinds have in common: construction as Megatron-core does it, and the parameters.

    Whether there is a bias is a matter of the network (`LinearSource.bias`), not of the argument.

    Attributes:
        matrix: the rank's part of W.
        bias: parameter (J,), or (J / ranks,) where the out features are cut.
        u, d: parameters U (I, r) and D (r, J) of a low-rank addition, one of them cut.
    """

    side: Side

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        source: LinearSource,
        init_method: Any = None,
        bias: bool = True,
        skip_bias_add: bool = False,
        is_expert: bool = False,
        stride: int = 1,
        tp_comm_buffer_name: str | None = None,
        tp_group: Any = None,
        **unused: Any,
    ) -> None:
        """Make the rank's parameters.

        Args:
            input_size: in features of the whole matrix.
            output_size: out features of the whole matrix.
            config: Megatron-core's configuration.
            source: the layer in the network.
            init_method: not used: start values are loaded.
            bias: not used.
            skip_bias_add: return the bias instead of adding it.
            is_expert: must be false: experts have modules of their own.
            stride: must be 1.
            tp_comm_buffer_name: not used.
            tp_group: the tensor-parallel ranks; None = those of Megatron-core's global state.
            unused: what other versions pass.

        Raises:
            ValueError: sizes are not those of the site, or something is asked for that these
                layers do not do.
            ParallelError: the site cannot be cut over the ranks.
        """
        super().__init__()
        site = source.site
        if (input_size, output_size) != (site.in_features, site.out_features):
            raise ValueError(
                f"{site.name} is {site.in_features} x {site.out_features}, but a layer of "
                f"{input_size} x {output_size} is built from it"
            )
        if is_expert or stride != 1:
            raise ValueError(f"{site.name}: is_expert and stride {stride} are not for this layer")
        self.config, self.source, self.skip_bias_add = config, source, skip_bias_add
        self.tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        self.rank_side = RankSide(self.side, self.tp_group.size(), self.tp_group.rank())
        self.is_parallel = self.rank_side.parts > 1
        self.sequence_parallel = self.is_parallel and bool(config.sequence_parallel)
        self.matrix = rank_matrix(source, self.rank_side)
        self._add_adapter()
        self._add_bias()

    def _add_bias(self) -> None:
        source = self.source
        if source.bias is None:
            return
        if self.side == "out":
            cut = self.rank_side.cut(0, source.period)
            source.slots.add(self, "bias", source.bias, cut)
        else:
            # Under sequence parallelism a rank adds it to its own tokens alone.
            source.slots.add(self, "bias", source.bias, is_partial=self.sequence_parallel)

    def _add_adapter(self) -> None:
        source, is_partial = self.source, self.is_parallel
        if source.adapter is None:
            return
        u, d = source.adapter
        if self.side == "out":
            source.slots.add(self, "u", u, is_partial=is_partial)
            source.slots.add(self, "d", d, self.rank_side.cut(1, source.period))
        else:
            source.slots.add(self, "u", u, self.rank_side.cut(0, source.period))
            source.slots.add(self, "d", d, is_partial=is_partial)

    def _bias(self, x: Tensor) -> Tensor | None:
        return self.read("bias").to(x.dtype) if self.owns("bias") else None

    def _multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map the rank's x (..., I') to its y (..., J')."""
        y: Tensor = self.matrix(x, bias)
        if self.owns("u"):
            y = y + (x @ self.read("u").to(x.dtype)) @ self.read("d").to(x.dtype)
        return y

    def backward_dw(self) -> None:
        """Do nothing: gradients of weights are computed with those of the input."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: parameters are saved and loaded by their logical names (`Placement`)."""
        raise NotImplementedError(
            f"{self.source.site.name}: this engine saves and loads parameters by logical name, "
            "through the Placement that each carries; Megatron-core's own checkpoints are not used"
        )


class ColumnLinear(ParallelLinear):
    """`y = x W + b`, of which each rank computes its out features for all tokens."""

    side: Side = "out"

    def __init__(
        self, input_size: int, output_size: int, *, gather_output: bool = False, **kwargs: Any
    ) -> None:
        """Make the rank's parameters; see `ParallelLinear`.

        Args:
            input_size: in features.
            output_size: out features of the whole matrix.
            gather_output: must be false: features stay cut until the row-parallel layer.
            kwargs: see `ParallelLinear`.
        """
        if gather_output:
            raise ValueError(f"{kwargs['source'].site.name}: gather_output is not for this layer")
        super().__init__(input_size, output_size, **kwargs)

    def enter(self, x: Tensor) -> Entered:
        """Let an input come in that this layer and others like it read.

        Args:
            x: (S, B, I), with sequence parallelism (S/ranks, B, I).
        """
        return Entered(x, self.tp_group, is_split=self.sequence_parallel)

    def forward(self, x: Tensor | Entered) -> Output:
        """Map x (S, B, I), with sequence parallelism (S/ranks, B, I), to (S, B, J/ranks).

        Args:
            x: hidden states, or what `enter` made of them for several layers.
        """
        entered = x if isinstance(x, Entered) else self.enter(x)
        bias = self._bias(entered.whole)
        with entered.kept():
            y = self._multiply(entered.whole, None if self.skip_bias_add else bias)
        return y, (bias if self.skip_bias_add else None)


class RowLinear(ParallelLinear):
    """`y = x W + b`, of which each rank multiplies its in features; the products are summed."""

    side: Side = "in"

    def __init__(
        self, input_size: int, output_size: int, *, input_is_parallel: bool = True, **kwargs: Any
    ) -> None:
        """Make the rank's parameters; see `ParallelLinear`.

        Args:
            input_size: in features of the whole matrix.
            output_size: out features.
            input_is_parallel: must be true: x holds the rank's features.
            kwargs: see `ParallelLinear`.
        """
        if not input_is_parallel:
            raise ValueError(
                f"{kwargs['source'].site.name}: this layer takes features that are cut already"
            )
        super().__init__(input_size, output_size, **kwargs)

    def forward(self, x: Tensor) -> Output:
        """Map x (S, B, I/ranks) to (S, B, J), with sequence parallelism to (S/ranks, B, J)."""
        y = self._multiply(x)
        if self.sequence_parallel:
            y = reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        elif self.is_parallel:
            y = reduce_from_tensor_model_parallel_region(y, group=self.tp_group)
        bias = self._bias(y)
        if self.skip_bias_add or bias is None:
            return y, bias
        return y + bias, None
