"""The experts that a rank holds: all or some of them, all or some of their inner features.

Two cuts meet in an expert's tensors. Expert parallelism (ep) gives a rank some of the experts: the
expert axis is cut. Expert-tensor parallelism (etp) gives it some of the features between the two
matrices of every expert: one mode of one core is cut (see `mpotrain.engine.megatron.periods`), or
one dimension of a dense matrix.

Who sums gradients. What has an expert axis is summed over the ranks that hold the same experts. The
central tensor, which all experts share, is summed over all ranks that meet tokens, like any dense
parameter: every (token, expert) row is worked on once, so the sum over tensor-, context- and
data-parallel ranks counts every row once. Where etp ranks share features, each computes a part of
the gradient of every core that it holds whole; that is summed over them in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mpotrain.engine.megatron.feature_cuts import RankPart
from mpotrain.engine.megatron.periods import Face, ModeCut, Side
from mpotrain.engine.megatron.placement import Cut
from mpotrain.engine.megatron.rank_sums import sum_gradients
from mpotrain.engine.megatron.slots import LogicalModule
from mpotrain.engine.megatron.sources import MixtureSource
from mpotrain.errors import ParallelError
from mpotrain.models.sites import Site
from mpotrain.nn.linear import dtype_name, profile_name
from mpotrain.nn.moe.config import AsymmetricExpertSite, MPOExpertSite, expert_site_plan
from mpotrain.tensor.expert_linear import expert_linear
from mpotrain.tensor.expert_plan import ExpertPlan
from mpotrain.tensor.grouped import grouped_matmul
from mpotrain.tensor.plan import PROFILES
from mpotrain.tensor.spec import MPOSpec

_DIMENSION: dict[Side, int] = {"in": 1, "out": 2}
"""Dimension of the mode of a side in a core (d, i, j, d'), and in dense matrices (E, I, J)."""


@dataclass(frozen=True)
class ExpertCuts:
    """How the matrices of a mixture lie on the ranks.

    Attributes:
        experts: ranks that share the experts (ep).
        features: ranks that share the inner features of each expert (etp).
        tensor: ranks that share everything but experts (tp).
        period: of the features that are cut.
    """

    experts: dist.ProcessGroup
    features: dist.ProcessGroup
    tensor: dist.ProcessGroup
    period: int

    def of_experts(self) -> Cut:
        """Return the cut of an expert axis, the first dimension."""
        return Cut(0, self.experts.size(), self.experts.rank())

    def of_features(self, dim: int, period: int | None = None) -> Cut:
        """Return the cut of a dimension that runs over inner features, or over a mode of them.

        Args:
            dim: the dimension.
            period: of its values; None = that of features.
        """
        chosen = self.period if period is None else period
        return Cut(dim, self.features.size(), self.features.rank(), chosen)

    def of_mode(self, site: Site, side: Side) -> ModeCut | None:
        """Return the mode of an operator that is cut; None where features are not shared.

        Raises:
            ParallelError: no mode can be cut by the period.
        """
        if self.features.size() == 1:
            return None
        features = site.in_features if side == "in" else site.out_features
        cut = Face(site.name, features, site.spec, side, features).cut(
            self.period, self.features.size()
        )
        if cut is None:
            raise ParallelError(
                f"{site.name}: its {side} modes cannot be cut into {self.features.size()} parts by "
                f"the period {self.period}; use parallel.expert_tensor=1"
            )
        return cut


class ExpertMatrices(LogicalModule):
    """One matrix of each expert of this rank: `y = x W_e + b_e`.

    Under etp a matrix with cut outputs computes some of them; a matrix with cut inputs computes a
    part of the sum that is y, and one rank alone adds the bias.
    """

    def __init__(self, source: MixtureSource, site: Site, side: Side, cuts: ExpertCuts) -> None:
        """Make the bias.

        Args:
            source: the mixture.
            site: the matrix.
            side: on which side its features are cut.
            cuts: how.
        """
        super().__init__()
        self._features, self._adds_up = cuts.features, side == "in"
        if site.bias:
            inner = () if self._adds_up else (cuts.of_features(1),)
            name = f"{site.name}.bias"
            source.slots.add(self, "bias", name, cuts.of_experts(), *inner, is_expert=True)

    def forward(self, rows: Tensor, counts: list[int], nominal_rows: int) -> Tensor:
        """Map rows (M, I), sorted by expert, to (M, J).

        Args:
            rows: of the first local expert, then of the second, ...
            counts: rows of each local expert.
            nominal_rows: rows for which the layer is planned: a function of shapes alone.
        """
        raise NotImplementedError

    def _bias(self) -> Tensor | None:
        """Return b (E, J) or None; on all but one of the ranks that add up to y, zeros.

        Those ranks all get the gradient of the sum, which is that of the bias.
        """
        if not self.owns("bias"):
            return None
        bias = self.read("bias")
        if self._adds_up and self._features.rank() > 0:
            return bias - bias.detach()
        return bias


class DenseExpertMatrices(ExpertMatrices):
    """An ordinary matrix for each expert."""

    def __init__(self, source: MixtureSource, site: Site, side: Side, cuts: ExpertCuts) -> None:
        """Make the parameters, see `ExpertMatrices`."""
        super().__init__(source, site, side, cuts)
        both = (cuts.of_experts(), cuts.of_features(_DIMENSION[side]))
        source.slots.add(self, "weight", f"{site.name}.weight", *both, is_expert=True)

    def forward(self, rows: Tensor, counts: list[int], nominal_rows: int) -> Tensor:
        """See `ExpertMatrices.forward`."""
        return grouped_matmul(rows, self.read("weight"), counts, self._bias())


class MPOExpertMatrices(ExpertMatrices):
    """W_e = L_e C R_e with one central tensor C for the experts of all ranks (Gao et al. 2022).

    Attributes:
        spec: what this rank holds of the operator of one expert.
    """

    def __init__(
        self,
        source: MixtureSource,
        site: Site,
        side: Side,
        cuts: ExpertCuts,
        choice: MPOExpertSite | AsymmetricExpertSite,
        spec: MPOSpec,
    ) -> None:
        """Make the parameters, see `ExpertMatrices`.

        Args:
            source: the mixture.
            site: the matrix.
            side: on which side its features are cut.
            cuts: how.
            choice: the representation asked for.
            spec: operator of one expert, whole.

        Raises:
            ParallelError: no mode of the side can be cut.
        """
        super().__init__(source, site, side, cuts)
        cut = cuts.of_mode(site, side)
        self._choice, self._cut_core = choice, None if cut is None else cut.core
        self.spec = RankPart(cuts.features.size(), side, cut).spec(spec)
        self._num_local, dim = site.num_experts // cuts.experts.size(), _DIMENSION[side]
        names = [f"auxiliaries.{k}" for k in range(spec.num_cores - 1)]
        names.insert(spec.central_index, "central")
        self._attributes = tuple(name.replace(".", "_") for name in names)
        for core, attribute in enumerate(self._attributes):
            name = f"{site.name}.{names[core]}"
            is_cut = cut is not None and core == cut.core
            if core == spec.central_index:
                inner = [cuts.of_features(dim, cut.period)] if cut and is_cut else []
                is_partial = cuts.tensor.size() > 1 and cuts.features.size() == 1
                source.slots.add(self, attribute, name, *inner, is_partial=is_partial)
            else:
                # Behind the expert axis.
                inner = [cuts.of_features(dim + 1, cut.period)] if cut and is_cut else []
                source.slots.add(self, attribute, name, cuts.of_experts(), *inner, is_expert=True)

    def plan(self, nominal_rows: int, dtype: torch.dtype, device: torch.device) -> ExpertPlan:
        """Return the plan of the local experts for `nominal_rows` rows of all together."""
        return expert_site_plan(
            self._choice,
            self.spec,
            self._num_local,
            nominal_rows,
            dtype_name(dtype),
            PROFILES[profile_name(device, dtype)],
        )

    def forward(self, rows: Tensor, counts: list[int], nominal_rows: int) -> Tensor:
        """See `ExpertMatrices.forward`."""
        plan = self.plan(nominal_rows, rows.dtype, rows.device)
        cores = [self.read(attribute) for attribute in self._attributes]
        if self._cut_core is not None:
            kept = cores.pop(self._cut_core)
            cores = list(sum_gradients(self._features, *cores))
            cores.insert(self._cut_core, kept)
        central = cores.pop(self.spec.central_index)
        return expert_linear(rows, central, cores, self.spec, counts, plan, self._bias())

    def extra_repr(self) -> str:
        """Describe the operators in `print(model)`."""
        spec = self.spec
        return (
            f"{self._num_local} experts, {spec.in_features} -> {spec.out_features}, "
            f"modes {spec.in_modes} x {spec.out_modes}, bonds {spec.bonds}"
        )


def expert_matrices(
    source: MixtureSource, site: Site, side: Side, cuts: ExpertCuts
) -> ExpertMatrices:
    """Return one matrix of each expert of a rank, in the representation of its site."""
    if isinstance(site.choice, MPOExpertSite | AsymmetricExpertSite) and site.spec is not None:
        return MPOExpertMatrices(source, site, side, cuts, site.choice, site.spec)
    return DenseExpertMatrices(source, site, side, cuts)
