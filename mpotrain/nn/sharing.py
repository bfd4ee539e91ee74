"""Layers of which some weights belong to all layers of a group (Liu et al. 2023, MPOBERT).

    W_l = A_1^l A_2^l C A_3^l A_4^l + U_l D_l                                  (section 3.1)

What layers share is owned once, by the network, and comes to a layer as an argument: no parameter
is registered twice, so that engines, optimizers and checkpoints see it once, and its gradient is
the sum over all layers that use it. The network reads it in its own forward pass, where weights
split by ZeRO-3 are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpotrain.nn.config import MPOSite, TTMSite, site_plan
from mpotrain.nn.deep_init import join_cores
from mpotrain.nn.linear import DenseLinear, TensorizedLinear, dtype_name, profile_name
from mpotrain.nn.roles import Role, set_role
from mpotrain.tensor import contract
from mpotrain.tensor.plan import PROFILES, ContractionPlan
from mpotrain.tensor.spec import MPOSpec

Parts = dict[str, Tensor]
"""What a layer is given from outside: `central`, `bias`, `weight`, `u`, `d`, as far as they are
not its own. A plain container: activation checkpointing and the hooks of ZeRO-3 look into it."""


class CentralBank(nn.Module):
    """The central tensors that layers share: one for each family of matrices and group of layers.

    Logical names are `<family>.<group>`.
    """

    def __init__(self, families: Mapping[str, Sequence[Tensor]]) -> None:
        """Own the central tensors.

        Args:
            families: start values by family, one for each group.
        """
        super().__init__()
        for family, centrals in families.items():
            owned = (set_role(nn.Parameter(central), Role.CENTRAL) for central in centrals)
            self.add_module(family, nn.ParameterList(owned))

    def central(self, family: str, group: int) -> Tensor:
        """Return the central tensor of a family for the layers of a group."""
        owned = self.get_submodule(family)
        if not isinstance(owned, nn.ParameterList):
            raise TypeError(f"{family} is a {type(owned).__name__}, not a list of parameters")
        found: Tensor = owned[group]
        return found


class SharedLinear(nn.Module):
    """`y = x W + b` for an operator whose central tensor comes as an argument.

    Computes exactly as `TensorizedLinear` does, by the same plans.

    Attributes:
        spec: modes and bonds of the operator.
        bank: logical name of the central tensor in the network that owns it.
        auxiliaries: parameters (d, i, j, d'), role auxiliary: the cores of `spec` in their order,
            the central one left out.
        bias: parameter (J,), or None where there is none or it is shared too.
    """

    def __init__(
        self,
        spec: MPOSpec,
        site: MPOSite | TTMSite,
        auxiliaries: Sequence[Tensor],
        *,
        bias: bool,
        bank: str,
    ) -> None:
        super().__init__()
        self.spec, self.site, self.bank = spec, site, bank
        self.auxiliaries = nn.ParameterList(nn.Parameter(core.clone()) for core in auxiliaries)
        for core in self.auxiliaries:
            set_role(core, Role.AUXILIARY)
        self.bias = nn.Parameter(torch.zeros(spec.out_features)) if bias else None

    def plan(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> ContractionPlan:
        """Return the plan for `num_tokens` rows of x on `device`."""
        profile = PROFILES[profile_name(device, dtype)]
        return site_plan(self.site, self.spec, num_tokens, dtype_name(dtype), profile)

    def forward(self, x: Tensor, central: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map x (..., I) to (..., J).

        Args:
            x: activations.
            central: the shared tensor C.
            bias: (J,), where it is shared; excludes a bias of the layer's own.
        """
        bias = self.bias if bias is None else bias
        plan = self.plan(x.numel() // self.spec.in_features, x.dtype, x.device)
        cast = None if bias is None else bias.to(x.dtype)
        return contract.linear(x, self.cores(central), self.spec, plan, cast)

    def cores(self, central: Tensor) -> list[Tensor]:
        """Return all cores of the operator around a central tensor."""
        return join_cores(central, list(self.auxiliaries), self.spec)

    def extra_repr(self) -> str:
        """Describe the operator in `print(model)`."""
        spec = self.spec
        return (
            f"{spec.in_features} -> {spec.out_features}, modes {spec.in_modes} x "
            f"{spec.out_modes}, bonds {spec.bonds}, central tensor {self.bank}"
        )


LayerLinear = DenseLinear | TensorizedLinear | SharedLinear
"""What a matrix of a layer may be."""


class Adapter(nn.Module):
    """A low-rank addition U D to a matrix (Hu et al. 2022; Liu et al. 2023, section 3.1).

    Attributes:
        u: parameter U (I, r), zero at start, so that the addition is.
        d: parameter D (r, J), Gaussian at start.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        std: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        draw = torch.empty(rank, out_features).normal_(0.0, std, generator=generator)
        self.u = set_role(nn.Parameter(torch.zeros(in_features, rank)), Role.ADAPTER)
        self.d = set_role(nn.Parameter(draw), Role.ADAPTER)


def project(layer: nn.Module, x: Tensor, parts: Parts) -> Tensor:
    """Map x (..., I) to (..., J) by a matrix of a layer and what it is given from outside.

    Args:
        layer: a `LayerLinear`.
        x: activations.
        parts: shared central tensor and bias, and the adapter, as far as there are any.
    """
    bias = parts.get("bias")
    if isinstance(layer, SharedLinear):
        y: Tensor = layer(x, parts["central"], bias)
    else:
        y = layer(x)
        if bias is not None:
            y = y + bias.to(y.dtype)
    if "u" in parts:
        y = y + (x @ parts["u"].to(x.dtype)) @ parts["d"].to(x.dtype)
    return y


def folded_weight(layer: LayerLinear, parts: Parts) -> Tensor:
    """Return the dense matrix W + U D (I, J) that a layer stands for.

    Args:
        layer: a matrix of a layer.
        parts: what it is given from outside, as in `project`.

    Returns:
        The matrix, computed in float64, in the dtype of its weights.
    """
    if isinstance(layer, DenseLinear):
        dtype, weight = layer.weight.dtype, layer.weight.double().t()
    else:
        if isinstance(layer, SharedLinear):
            cores = layer.cores(parts["central"])
        else:
            cores = list(layer.cores)
        dtype = cores[0].dtype
        weight = contract.rebuild([core.double() for core in cores], layer.spec)
    if "u" in parts:
        weight = weight + parts["u"].double() @ parts["d"].double()
    return weight.to(dtype)
