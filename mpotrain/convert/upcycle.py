"""The weights of a trained model laid into a new network; experts are copies of one matrix.

MPOE (Gao et al. 2022, arXiv 2203.01104, section 3) starts from a trained dense model: each
feed-forward matrix is decomposed once, the central tensor is kept once for all experts and the
auxiliary tensors are copied for each of them, so that the mixture computes what the dense layer
did. With dense experts it is the sparse upcycling of Komatsuzaki et al. 2022 (arXiv 2212.05055).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpotrain.convert.source import Source
from mpotrain.errors import CheckpointError
from mpotrain.models.config import GPT2Config
from mpotrain.models.sites import Site
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.decompose import decompose
from mpotrain.tensor.spec import MPOSpec, exact_bonds

ROUTER = ".ffn.router."
"""What the names of all parameters that a dense model has not contain."""


@dataclass(frozen=True)
class SiteError:
    """What an expert's matrix has lost against the one that it was made of.

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


def fill(model: nn.Module, source: Source, config: GPT2Config) -> list[SiteError]:
    """Overwrite the weights of a freshly drawn model with those of a trained one.

    Args:
        model: built from `config`; its routers stay as they were drawn.
        source: the trained model, of the same sizes.
        config: of the new model.

    Returns:
        One entry for each matrix of experts that is decomposed.

    Raises:
        CheckpointError: a parameter is missing in the source or has another shape there.
    """
    parameters = dict(model.named_parameters())
    errors = []
    with torch.no_grad():
        for site in config.all_sites():
            if not site.num_experts:
                continue
            values, error = expert_tensors(site, source.matrix(site.name))
            if error is not None:
                errors.append(error)
            if site.bias:
                values[f"{site.name}.bias"] = source.weights[f"{site.name}.bias"]
            for name, value in values.items():
                parameter = parameters.pop(name)
                shared = name.endswith(".central")
                if parameter.shape[0 if shared else 1 :] != value.shape:
                    raise CheckpointError(
                        f"{name}: {tuple(value.shape)} from the source does not fit "
                        f"{tuple(parameter.shape)}"
                    )
                parameter.copy_(value)  # one row after the other: every expert begins alike
        for name in [name for name in parameters if name in source.weights]:
            parameters.pop(name).copy_(source.weights[name])
    left = [name for name in parameters if ROUTER not in name]
    if left:
        raise CheckpointError(f"the source has no {', '.join(left)}")
    return errors


def expert_tensors(site: Site, weight: Tensor) -> tuple[dict[str, Tensor], SiteError | None]:
    """Return the tensors that every expert of a site has, made of one matrix.

    Args:
        site: of a mixture.
        weight: W (in_features, out_features).

    Returns:
        Tensors by logical name without the dimension of experts, and what was lost; None where
        experts are dense.
    """
    if site.spec is None:
        return {f"{site.name}.weight": weight}, None
    spec = site.spec
    cores = decompose(weight, spec.in_modes, spec.out_modes, bonds=spec.bonds).cores
    central = spec.central_index
    values = {f"{site.name}.central": cores[central]}
    for k, core in enumerate((*cores[:central], *cores[central + 1 :])):
        values[f"{site.name}.auxiliaries.{k}"] = core
    exact = exact_bonds(spec.in_modes, spec.out_modes)
    error = SiteError(
        site.name, spec.bonds, spec.bonds != exact, relative_error(weight, cores, spec)
    )
    return values, error


def relative_error(weight: Tensor, cores: tuple[Tensor, ...], spec: MPOSpec) -> float:
    """Return the norm of W - rebuild(cores) over that of W, computed in float64."""
    exact = weight.double()
    rebuilt = rebuild([core.double() for core in cores], spec)
    difference, norm = float((exact - rebuilt).norm()), float(exact.norm())
    return difference / norm if norm > 0 else difference
