"""Weight matrices of experts: cores around a shared central tensor, or one matrix each.

A layer takes the number of experts that it holds from its tensors, not from the configuration:
under expert parallelism an engine cuts their first dimension down to the experts of a rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpotrain.nn.linear import dtype_name, profile_name
from mpotrain.nn.moe.config import ExpertSite, expert_site_plan
from mpotrain.nn.moe.expert_init import init_experts
from mpotrain.nn.roles import Role, set_experts, set_role
from mpotrain.tensor.expert_linear import expert_linear
from mpotrain.tensor.expert_plan import ExpertPlan
from mpotrain.tensor.grouped import grouped_matmul
from mpotrain.tensor.plan import PROFILES
from mpotrain.tensor.spec import MPOSpec


class MPOExperts(nn.Module):
    """`y = x W_e + b_e` with W_e = L_e C R_e, C shared by all experts (Gao et al. 2022, MPOE).

    Attributes:
        spec: operator of one expert.
        site: the representation asked for.
        central: parameter C (d2, i3, j3, d3), role central.
        auxiliaries: parameters (E, d, i, j, d'), role auxiliary: the cores of `spec` in their
            order, the central one left out.
        bias: parameter (E, J), role expert, or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        spec: MPOSpec,
        site: ExpertSite,
        num_experts: int,
        *,
        bias: bool,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.site = spec, site
        central, auxiliaries = init_experts(
            spec,
            num_experts,
            std,
            scheme=site.init,
            start=site.start,
            generator=generator,
        )
        self.central = set_role(nn.Parameter(central), Role.CENTRAL)
        self.auxiliaries = nn.ParameterList(nn.Parameter(core) for core in auxiliaries)
        for core in self.auxiliaries:
            set_experts(set_role(core, Role.AUXILIARY), num_experts)
        self.register_parameter("bias", _bias(num_experts, spec.out_features) if bias else None)

    def plan(self, nominal_rows: int, dtype: torch.dtype, device: torch.device) -> ExpertPlan:
        """Return the plan of the local experts for `nominal_rows` rows of all together."""
        return expert_site_plan(
            self.site,
            self.spec,
            self.auxiliaries[0].shape[0],
            nominal_rows,
            dtype_name(dtype),
            PROFILES[profile_name(device, dtype)],
        )

    def forward(self, rows: Tensor, counts: list[int], nominal_rows: int) -> Tensor:
        """Map rows (M, I), sorted by expert, to (M, J).

        Args:
            rows: tokens of the first local expert, then of the second, ...
            counts: rows of each local expert; they sum to M.
            nominal_rows: rows for which the layer is planned: a function of shapes alone, so that
                the order of sums does not follow the data.
        """
        _check(counts, self.auxiliaries[0].shape[0])
        plan = self.plan(nominal_rows, rows.dtype, rows.device)
        return expert_linear(
            rows, self.central, list(self.auxiliaries), self.spec, counts, plan, self.bias
        )

    def extra_repr(self) -> str:
        """Describe the operators in `print(model)`."""
        spec = self.spec
        return (
            f"{self.auxiliaries[0].shape[0]} experts, {spec.in_features} -> {spec.out_features}, "
            f"modes {spec.in_modes} x {spec.out_modes}, bonds {spec.bonds}"
        )


class DenseExperts(nn.Module):
    """`y = x W_e + b_e` with an ordinary matrix for each expert (Fedus et al. 2022, Switch).

    Attributes:
        weight: parameter (E, I, J), role expert.
        bias: parameter (E, J), role expert, or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        *,
        bias: bool,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        weight = torch.empty(num_experts, in_features, out_features)
        for matrix in weight:
            matrix.normal_(0.0, std, generator=generator)
        self.weight = set_experts(set_role(nn.Parameter(weight), Role.EXPERT), num_experts)
        self.register_parameter("bias", _bias(num_experts, out_features) if bias else None)

    def forward(self, rows: Tensor, counts: list[int], nominal_rows: int) -> Tensor:
        """Map rows (M, I), sorted by expert, to (M, J); see `MPOExperts.forward`."""
        _check(counts, self.weight.shape[0])
        return grouped_matmul(rows, self.weight, counts, self.bias)

    def extra_repr(self) -> str:
        """Describe the matrices in `print(model)`."""
        num_experts, in_features, out_features = self.weight.shape
        return f"{num_experts} experts, {in_features} -> {out_features}"


def _bias(num_experts: int, out_features: int) -> nn.Parameter:
    bias = nn.Parameter(torch.zeros(num_experts, out_features))
    return set_experts(set_role(bias, Role.EXPERT), num_experts)


def _check(counts: list[int], num_local: int) -> None:
    if len(counts) != num_local:
        raise ValueError(
            f"rows of {len(counts)} experts, but this layer holds {num_local}: the dispatcher "
            "does not fit the experts of this rank"
        )
