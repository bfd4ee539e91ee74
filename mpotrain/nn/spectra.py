"""Norms and entanglement of every tensorized layer of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from mpotrain.nn.linear import TensorizedEmbedding, TensorizedLinear
from mpotrain.nn.moe.experts import MPOExperts
from mpotrain.nn.sharing import SharedLinear
from mpotrain.tensor.experts import num_expert_parameters
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.spectra import (
    bond_spectra,
    core_norms,
    entanglement_entropy,
    normalised_entropies,
)

MOST_EXPERTS = 4
"""Experts of a mixture whose singular values are computed: nearly a second each for the published
sizes on one CPU core. The experts are evenly spaced, the first one is among them."""


@dataclass(frozen=True)
class SiteSpectrum:
    """What the cores of one layer say about its matrix.

    Of a mixture of experts: norms of auxiliary cores are root mean squares over all experts;
    `weight_norm` and the entropies are means over up to `MOST_EXPERTS` of them.

    Attributes:
        name: logical name of the layer.
        spec: its operator (of one expert).
        norms: Frobenius norm of each core.
        weight_norm: Frobenius norm of the (padded) rebuilt matrix.
        entropies: entanglement entropy of each bond, nats.
        normalised: entropies over the logarithm of the largest possible rank of that bond.
        num_experts: experts that share the central core; 0 outside of mixtures.
        bank: logical name of the central tensor where layers share it, else None.
        owns_central: False for a layer whose central tensor was counted with an earlier one.
        expert_spread: how far the auxiliary cores of the experts lie apart: root mean square
            distance from their mean over their root mean square norm; 0 for copies of one expert,
            nearly 1 for independent ones.
    """

    name: str
    spec: MPOSpec
    norms: list[float]
    weight_norm: float
    entropies: list[float]
    normalised: list[float]
    num_experts: int = 0
    expert_spread: float = 0.0
    bank: str | None = None
    owns_central: bool = True

    @property
    def num_parameters(self) -> int:
        """Number of elements of all cores, those shared with earlier layers left out."""
        if self.num_experts:
            return num_expert_parameters(self.spec, self.num_experts)
        shared = 0 if self.owns_central else prod(self.spec.core_shapes[self.spec.central_index])
        return self.spec.num_parameters - shared


def tensorized_layers(
    model: nn.Module,
) -> Iterator[tuple[str, TensorizedLinear | TensorizedEmbedding]]:
    """Yield every tensorized layer of `model` with its logical name."""
    for name, module in model.named_modules():
        if isinstance(module, TensorizedLinear | TensorizedEmbedding):
            yield name, module


@torch.no_grad()
def model_spectra(model: nn.Module) -> list[SiteSpectrum]:
    """Return the spectrum of every tensorized layer: experts, and those that share a core, too.

    The singular values of each unfolding come from orthogonal sweeps over the cores in float64 on
    the CPU; no matrix is rebuilt, and the result does not depend on the device.
    """
    result = [
        _layer_spectrum(name, layer.spec, list(layer.cores))
        for name, layer in tensorized_layers(model)
    ]
    for name, module in model.named_modules():
        if isinstance(module, SharedLinear):
            bank, central = _owned_central(model, name, module.bank)
            spectrum = _layer_spectrum(name, module.spec, module.cores(central))
            is_first = all(site.bank != bank for site in result)
            result.append(replace(spectrum, bank=bank, owns_central=is_first))
        if isinstance(module, MPOExperts):
            result.append(_expert_spectrum(name, module))
    return result


def _layer_spectrum(name: str, spec: MPOSpec, parameters: Sequence[Tensor]) -> SiteSpectrum:
    cores = [_exact(core) for core in parameters]
    weight_norm, entropies, normalised = _bonds(cores)
    return SiteSpectrum(name, spec, core_norms(cores), weight_norm, entropies, normalised)


def _owned_central(model: nn.Module, name: str, bank: str) -> tuple[str, Tensor]:
    """Return the name in `model`, and the value, of the central tensor that a layer is given.

    The layer knows the name in the network that both belong to, which may be part of `model`.
    """
    path = name.split(".")
    names = {parameter for parameter, _ in model.named_parameters()}
    for length in reversed(range(len(path))):
        full = ".".join([*path[:length], bank])
        if full in names:
            return full, model.get_parameter(full)
    raise ValueError(f"{name} is given the central tensor {bank}, which no network around it owns")


def _expert_spectrum(name: str, layer: MPOExperts) -> SiteSpectrum:
    central = _exact(layer.central)
    auxiliaries = [_exact(core) for core in layer.auxiliaries]
    num_experts, position = auxiliaries[0].shape[0], layer.spec.central_index
    scale = num_experts**-0.5
    norms = [scale * norm for norm in core_norms(auxiliaries)]
    norms.insert(position, core_norms([central])[0])
    sampled = min(num_experts, MOST_EXPERTS)
    found = []
    for number in range(sampled):
        expert = number * num_experts // sampled
        own = [core[expert] for core in auxiliaries]
        found.append(_bonds([*own[:position], central, *own[position:]]))
    return SiteSpectrum(
        name=name,
        spec=layer.spec,
        norms=norms,
        weight_norm=_mean([norm for norm, _, _ in found]),
        entropies=[_mean(bond) for bond in zip(*(e for _, e, _ in found), strict=True)],
        normalised=[_mean(bond) for bond in zip(*(n for _, _, n in found), strict=True)],
        num_experts=num_experts,
        expert_spread=_spread(auxiliaries),
    )


def _bonds(cores: list[Tensor]) -> tuple[float, list[float], list[float]]:
    """Return the norm of the matrix, and entropies and normalised entropies of its bonds."""
    spectra = bond_spectra(cores)
    weight_norm = float(torch.linalg.vector_norm(spectra[0]))
    return (
        weight_norm,
        [entanglement_entropy(values) for values in spectra],
        normalised_entropies(spectra),
    )


def _spread(auxiliaries: list[Tensor]) -> float:
    """Return the distance of experts from their mean over their norm, over all cores (E, ...)."""
    apart = sum(float((core - core.mean(0)).square().sum()) for core in auxiliaries)
    whole = sum(float(core.square().sum()) for core in auxiliaries)
    return (apart / whole) ** 0.5 if whole > 0 else 0.0


def _exact(core: Tensor) -> Tensor:
    return core.detach().to("cpu", torch.float64)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
