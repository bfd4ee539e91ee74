"""Weight matrices and parameters of a model, foretold from its configuration (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mpotrain.nn.config import DenseSite, MPOSite, TTMSite
from mpotrain.nn.moe.config import AsymmetricExpertSite, DenseExpertSite, MPOExpertSite
from mpotrain.sample import Stream
from mpotrain.tensor.experts import auxiliary_shapes
from mpotrain.tensor.spec import MPOSpec

SiteChoice = DenseSite | MPOSite | TTMSite
"""Representations of a matrix that every token meets."""
ExpertSiteChoice = DenseExpertSite | MPOExpertSite | AsymmetricExpertSite
"""Representations of a matrix of which every expert has its own."""


@dataclass(frozen=True)
class Site:
    """One weight matrix of a model; in a mixture, that matrix of all its experts.

    Attributes:
        name: logical name of the module that owns it.
        family: what it is for; all sites of a family have one shape and one representation.
        in_features: rows I of W (y = x W).
        out_features: columns J of W.
        choice: the representation asked for in the configuration.
        spec: the operator (of one expert), None when dense.
        bias: whether a bias vector of length J goes with it (with every expert).
        num_experts: experts E of the mixture; 0 where every token meets the matrix.
        top_k: experts that a token meets; 1 where every token meets the matrix.
        stream: which rows of a sample meet it (those of the output layer for an embedding).
        calls: how often a forward pass uses it; above 1 where layers share the whole matrix.
        bank: name of the central tensor that layers share; None where the site owns its own.
        is_head: whether it serves pretraining alone and is left out of published sizes.
    """

    name: str
    family: str
    in_features: int
    out_features: int
    choice: SiteChoice | ExpertSiteChoice
    spec: MPOSpec | None
    bias: bool
    num_experts: int = 0
    top_k: int = 1
    stream: Stream = "inputs"
    calls: int = 1
    bank: str | None = None
    is_head: bool = False

    @property
    def key(self) -> str:
        """Where the run file describes it, below the section of the model."""
        leaf = self.family
        for prefix in ("encoder_", "decoder_", "cross_", "expert_"):
            leaf = leaf.removeprefix(prefix)
        if self.num_experts:
            return f"moe.{leaf}"
        return "moe.router" if leaf == "router" else f"sites.{leaf}"


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter (or buffer) foretold: logical name, shape and role.

    Attributes:
        name: name in `named_parameters()` and in checkpoints.
        shape: global shape, all experts included.
        role: value of `mpotrain.nn.roles.Role`.
        site: name of the site it belongs to, or None.
        num_experts: experts that the first dimension runs over; 0 without such a one.
        part: what it is for in a table of sizes, where it belongs to no site.
        is_head: whether it serves pretraining alone and is left out of published sizes.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    site: str | None
    num_experts: int = 0
    part: str = "norms"
    is_head: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def site_parameters(site: Site) -> Iterator[ParameterInfo]:
    """Yield every parameter that a site owns; a shared central tensor is the bank's."""
    yield from _expert_parameters(site) if site.num_experts else _plain_parameters(site)


def _plain_parameters(site: Site) -> Iterator[ParameterInfo]:
    if site.spec is None:
        # nn.Embedding and nn.Linear both keep (rows of the look-up | outputs) first.
        shape = (site.in_features, site.out_features)
        if site.family != "embedding":
            shape = (site.out_features, site.in_features)
        yield ParameterInfo(f"{site.name}.weight", shape, "dense", site.name)
    elif site.bank is not None:
        for k, core_shape in enumerate(auxiliary_shapes(site.spec)):
            yield ParameterInfo(f"{site.name}.auxiliaries.{k}", core_shape, "auxiliary", site.name)
    else:
        for k, core_shape in enumerate(site.spec.core_shapes):
            role = "central" if k == site.spec.central_index else "auxiliary"
            yield ParameterInfo(f"{site.name}.cores.{k}", core_shape, role, site.name)
    if site.bias:
        yield ParameterInfo(f"{site.name}.bias", (site.out_features,), "dense", site.name)


def _expert_parameters(site: Site) -> Iterator[ParameterInfo]:
    experts = site.num_experts
    if site.spec is None:
        matrices = (experts, site.in_features, site.out_features)
        yield ParameterInfo(f"{site.name}.weight", matrices, "expert", site.name, experts)
    else:
        central = site.spec.core_shapes[site.spec.central_index]
        yield ParameterInfo(f"{site.name}.central", central, "central", site.name)
        for k, own in enumerate(auxiliary_shapes(site.spec)):
            name = f"{site.name}.auxiliaries.{k}"
            yield ParameterInfo(name, (experts, *own), "auxiliary", site.name, experts)
    if site.bias:
        biases = (experts, site.out_features)
        yield ParameterInfo(f"{site.name}.bias", biases, "expert", site.name, experts)
