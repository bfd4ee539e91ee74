"""The part of a weight matrix that a tensor-parallel rank holds and multiplies by.

Of a matrix product operator one core is cut, on its out mode (column-parallel) or its in mode
(row-parallel); what a rank holds is again an operator, with that mode smaller. All other cores are
held whole by every rank. A rank sees its own features alone, so its gradient of these is a part
of theirs: they are partial.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mpotrain.engine.megatron.feature_cuts import RankPart
from mpotrain.engine.megatron.periods import Face, ModeCut, Side
from mpotrain.engine.megatron.placement import Cut
from mpotrain.engine.megatron.slots import LogicalModule
from mpotrain.engine.megatron.sources import LinearSource
from mpotrain.errors import ParallelError
from mpotrain.nn.config import MPOSite, TTMSite, site_plan
from mpotrain.nn.linear import dtype_name, profile_name
from mpotrain.tensor import contract
from mpotrain.tensor.plan import PROFILES, ContractionPlan
from mpotrain.tensor.spec import MPOSpec


@dataclass(frozen=True)
class RankSide:
    """Which features of a matrix a rank holds.

    Attributes:
        side: of the matrix that is cut: "out" in a column-parallel layer, "in" in a row-parallel.
        parts: tensor-parallel ranks.
        index: this rank's place among them.
    """

    side: Side
    parts: int
    index: int

    def cut(self, dim: int, period: int) -> Cut:
        """Return the cut of a dimension whose values are shared out by periods."""
        return Cut(dim, self.parts, self.index, period)


class DenseMatrix(LogicalModule):
    """The rank's rows or columns of a dense W.

    Attributes:
        weight: parameter (J, I) as in `torch.nn.Linear`, cut in one of the two.
    """

    def __init__(self, source: LinearSource, rank: RankSide) -> None:
        super().__init__()
        self._check(source, rank)
        cut = rank.cut(0 if rank.side == "out" else 1, source.period)
        source.slots.add(self, "weight", f"{source.site.name}.weight", cut)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map x (..., I') to (..., J') and add a bias (J',)."""
        bias = None if bias is None else bias.to(x.dtype)
        return functional.linear(x, self.read("weight").to(x.dtype), bias)

    @staticmethod
    def _check(source: LinearSource, rank: RankSide) -> None:
        site = source.site
        features = site.out_features if rank.side == "out" else site.in_features
        if rank.parts > 1 and (features % source.period or source.period % rank.parts):
            raise ParallelError(
                f"{site.name}: {features} {rank.side} features cannot be shared out over "
                f"{rank.parts} tensor-parallel ranks in periods of {source.period}; the period "
                "must divide the features and be a multiple of the ranks"
            )


class MPOMatrix(LogicalModule):
    """The rank's part of a matrix product operator, executed from its own contraction plan.

    Attributes:
        spec: modes and bonds of the part.
        core_0, core_1, ...: parameters (d_k, i_k, j_k, d_{k+1}) of the part.
    """

    def __init__(self, source: LinearSource, rank: RankSide) -> None:
        super().__init__()
        whole, site = source.site.spec, source.site.choice
        if whole is None or not isinstance(site, MPOSite | TTMSite):
            raise TypeError(f"{source.site.name} is no matrix product operator of one matrix")
        self.site = site
        cut = _mode_cut(source, whole, rank)
        self.spec = RankPart(rank.parts, rank.side, cut).spec(whole)
        self._attributes = tuple(f"core_{k}" for k in range(whole.num_cores))
        for k, name in enumerate(_core_names(source, whole)):
            if cut is not None and cut.core == k:
                part = rank.cut(2 if rank.side == "out" else 1, cut.period)
                source.slots.add(self, self._attributes[k], name, part)
            else:
                is_partial = rank.parts > 1
                source.slots.add(self, self._attributes[k], name, is_partial=is_partial)
        self.cached = None if source.cache is None else source.cache.matrix(self.cores(), self.spec)

    def cores(self) -> list[Tensor]:
        """Return the cores of the part, whoever owns them."""
        return [self.read(attribute) for attribute in self._attributes]

    def plan(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> ContractionPlan:
        """Return the plan for `num_tokens` rows of x on `device`."""
        profile = PROFILES[profile_name(device, dtype)]
        return site_plan(self.site, self.spec, num_tokens, dtype_name(dtype), profile)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map x (..., I') to (..., J') and add a bias (J',)."""
        cores = self.cores()
        bias = None if bias is None else bias.to(x.dtype)
        if self.cached is not None and self.cached.is_open:
            return self.cached.linear(x, cores, bias)
        plan = self.plan(x.numel() // self.spec.in_features, x.dtype, x.device)
        return contract.linear(x, cores, self.spec, plan, bias)

    def extra_repr(self) -> str:
        """Describe the part in `print(model)`."""
        spec = self.spec
        return (
            f"{spec.in_features} -> {spec.out_features}, modes {spec.in_modes} x "
            f"{spec.out_modes}, bonds {spec.bonds}"
        )


Matrix = DenseMatrix | MPOMatrix
"""What a parallel layer multiplies by."""


def rank_matrix(source: LinearSource, rank: RankSide) -> Matrix:
    """Return a rank's part of the matrix of a layer, in the representation of its site."""
    return DenseMatrix(source, rank) if source.site.spec is None else MPOMatrix(source, rank)


def _mode_cut(source: LinearSource, spec: MPOSpec, rank: RankSide) -> ModeCut | None:
    if rank.parts == 1:
        return None
    features = spec.out_features if rank.side == "out" else spec.in_features
    face = Face(source.site.name, features, spec, rank.side, source.period)
    where = f"{source.site.name}: the {rank.side} modes {list(face.modes())}"
    if face.is_padded():
        raise ParallelError(
            f"{where} have more than {features} features; a padded side cannot be cut over "
            f"{rank.parts} tensor-parallel ranks; choose modes that multiply to {features}"
        )
    cut = face.cut(source.period, rank.parts) if features % source.period == 0 else None
    if cut is None:
        raise ParallelError(
            f"{where} have none whose cut over {rank.parts} tensor-parallel ranks shares out "
            f"{features} features in periods of {source.period}"
        )
    return cut


def _core_names(source: LinearSource, spec: MPOSpec) -> list[str]:
    """Return the logical names of the cores in their order; see `mpotrain.models.sites`."""
    stem, central = source.site.name, spec.central_index
    if source.central is None:
        return [f"{stem}.cores.{k}" for k in range(spec.num_cores)]
    names = [f"{stem}.auxiliaries.{k}" for k in range(spec.num_cores - 1)]
    names.insert(central, source.central)
    return names
