"""The experts of a rank: two matrices of each, and an activation between them."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from mpotrain.engine.megatron.expert_matrices import ExpertCuts, expert_matrices
from mpotrain.engine.megatron.sources import MixtureSource
from mpotrain.errors import ParallelError
from mpotrain.nn.activation import activation


class Experts(nn.Module):
    """The experts of a rank, as megatron-core's mixtures call them.

    Attributes:
        c_fc: first matrices (H -> F).
        c_proj: second matrices (F -> H).
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        source: MixtureSource,
        **_: Any,
    ) -> None:
        """Make the parameters.

        Args:
            num_local_experts: experts of this rank.
            config: of megatron-core.
            pg_collection: groups `ep`, `expt_tp` and `tp`.
            source: the mixture.

        Raises:
            ParallelError: etp is neither 1 nor tp, or features cannot be cut.
        """
        super().__init__()
        features, tensor = pg_collection.expt_tp, pg_collection.tp
        if features.size() not in (1, tensor.size()):
            raise ParallelError(
                f"{source.name}: parallel.expert_tensor={features.size()} is neither 1 nor "
                f"parallel.tensor={tensor.size()}"
            )
        cuts = ExpertCuts(pg_collection.ep, features, tensor, source.period)
        self.c_fc = expert_matrices(source, source.c_fc, "out", cuts)
        self.c_proj = expert_matrices(source, source.c_proj, "in", cuts)
        self._activate = activation(source.activation)
        self._gates_input = source.moe.router.gate_at == "input"

    def forward(
        self, rows: Tensor, tokens_per_expert: Tensor, gates: Tensor, nominal_rows: int
    ) -> tuple[Tensor, None]:
        """Map rows (M, H), sorted by expert, to (M, H); under etp to a part of that sum.

        Args:
            rows: of the first local expert, then of the second, ...
            tokens_per_expert: rows of each local expert, int64 on the CPU.
            gates: factor of each row (M,).
            nominal_rows: see `ExpertMatrices.forward`.
        """
        counts = tokens_per_expert.tolist()
        if self._gates_input:
            rows = _times(rows, gates)
        rows = self._activate(self.c_fc(rows, counts, nominal_rows))
        rows = self.c_proj(rows, counts, nominal_rows)
        return rows if self._gates_input else _times(rows, gates), None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are not put off."""


def _times(rows: Tensor, gates: Tensor) -> Tensor:
    return (rows * gates[:, None]).to(rows.dtype)
