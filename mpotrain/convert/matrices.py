"""The weight matrices of a trained model, whatever they are made of, and matrices turned to cores.

All arithmetic is float64; results are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mpotrain.models.config import AnyModel
from mpotrain.models.sites import Site
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.decompose import decompose
from mpotrain.tensor.spec import MPOSpec, exact_bonds


@dataclass(frozen=True)
class SiteError:
    """What a matrix has lost against the one that its cores were made of.

    Attributes:
        name: logical name of the site.
        bonds: inner bond dimensions.
        truncated: whether a bond is below the exact one.
        error: Frobenius norm of the difference over that of the matrix; with exact bonds it is
            what rounding to fp32 leaves.
    """

    name: str
    bonds: tuple[int, ...]
    truncated: bool
    error: float


class Matrices:
    """The weight matrices of a model without mixtures of experts, by name of their site."""

    def __init__(self, config: AnyModel, weights: Mapping[str, Tensor]) -> None:
        """Look at the weights of a model.

        Args:
            config: of the model.
            weights: tensors by logical name.
        """
        self.sites = {site.name: site for site in config.all_sites()}
        self._weights = weights

    def cores(self, name: str) -> tuple[Tensor, ...] | None:
        """Return the cores of a matrix; None where it is dense."""
        site = self.sites[name]
        if site.spec is None:
            return None
        if site.bank is None:
            return tuple(self._weights[f"{name}.cores.{k}"] for k in range(site.spec.num_cores))
        own = [self._weights[f"{name}.auxiliaries.{k}"] for k in range(site.spec.num_cores - 1)]
        k = site.spec.central_index
        return (*own[:k], self._weights[site.bank], *own[k:])

    def matrix(self, name: str) -> Tensor:
        """Return W (in_features, out_features), y = x W."""
        cores, site = self.cores(name), self.sites[name]
        if cores is not None and site.spec is not None:
            return rebuild([core.double() for core in cores], site.spec).float()
        weight = self._weights[f"{name}.weight"]
        return weight if site.family == "embedding" else weight.t()

    def bias(self, site: Site) -> Tensor:
        """Return the bias of the site of that name, or zeros where it has none."""
        return vector(self._weights, f"{site.name}.bias", site.out_features)

    def values(self, site: Site) -> tuple[dict[str, Tensor], SiteError | None]:
        """Return the matrix of that name in the representation of another network's site.

        Args:
            site: of the other network, with tensors of its own.

        Returns:
            Tensors by logical name, without a bias, and what was lost where it is decomposed.
        """
        cores = self.cores(site.name)
        if cores is not None and same_cores(self.sites[site.name].spec, site.spec):
            return core_values(site, cores), None
        return matrix_values(site, self.matrix(site.name))


def matrix_values(site: Site, weight: Tensor) -> tuple[dict[str, Tensor], SiteError | None]:
    """Return a matrix W (in, out) in the representation of a site; see `Matrices.values`."""
    if site.spec is None:
        return {f"{site.name}.weight": weight if site.family == "embedding" else weight.t()}, None
    cores, error = decomposed(site.name, weight, site.spec)
    return core_values(site, cores), error


def core_values(site: Site, cores: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return cores under the names that a site with tensors of its own has for them."""
    return {f"{site.name}.cores.{k}": core for k, core in enumerate(cores)}


def vector(weights: Mapping[str, Tensor], name: str | None, size: int) -> Tensor:
    """Return a bias, or zeros (size,) where there is none, which compute the same."""
    found = None if name is None else weights.get(name)
    return torch.zeros(size) if found is None else found


def same_cores(theirs: MPOSpec | None, ours: MPOSpec | None) -> bool:
    """Whether two representations have cores of the same shapes for a matrix of the same size."""
    return theirs is not None and ours is not None and _shape(theirs) == _shape(ours)


def same_form(theirs: MPOSpec | None, ours: MPOSpec | None) -> bool:
    """Whether two representations are both dense, or have the same cores."""
    return (theirs is None and ours is None) or same_cores(theirs, ours)


def decomposed(name: str, weight: Tensor, spec: MPOSpec) -> tuple[tuple[Tensor, ...], SiteError]:
    """Decompose a matrix in the symmetric canonical gauge (Liu et al. 2021).

    Args:
        name: of the site, for the report.
        weight: W (in_features, out_features).
        spec: of its cores. Bonds above the exact ones, as published TTM models have them, are
            filled with zeros.

    Returns:
        The cores and what they have lost.
    """
    exact = exact_bonds(spec.in_modes, spec.out_modes)
    bonds = tuple(map(min, spec.bonds, exact))
    cores = decompose(weight, spec.in_modes, spec.out_modes, bonds=bonds).cores
    filled = tuple(
        functional.pad(core, (0, right - core.shape[3], 0, 0, 0, 0, 0, left - core.shape[0]))
        for core, (left, _, _, right) in zip(cores, spec.core_shapes, strict=True)
    )
    truncated = any(bond < most for bond, most in zip(spec.bonds, exact, strict=True))
    error = relative_error(weight, filled, spec)
    return filled, SiteError(name, spec.bonds, truncated, error)


def relative_error(weight: Tensor, cores: tuple[Tensor, ...], spec: MPOSpec) -> float:
    """Return the norm of W - rebuild(cores) over that of W, computed in float64."""
    exact = weight.double()
    rebuilt = rebuild([core.double() for core in cores], spec)
    difference, norm = float((exact - rebuilt).norm()), float(exact.norm())
    return difference / norm if norm > 0 else difference


def _shape(spec: MPOSpec) -> tuple[object, ...]:
    return spec.core_shapes, spec.in_features, spec.out_features
