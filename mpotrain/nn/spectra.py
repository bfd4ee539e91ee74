"""Norms and entanglement of every tensorized layer of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mpotrain.nn.linear import TensorizedEmbedding, TensorizedLinear
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.spectra import (
    bond_spectra,
    core_norms,
    entanglement_entropy,
    normalised_entropies,
)


@dataclass(frozen=True)
class SiteSpectrum:
    """What the cores of one layer say about its matrix.

    Attributes:
        name: logical name of the layer.
        spec: its operator.
        norms: Frobenius norm of each core.
        weight_norm: Frobenius norm of the (padded) rebuilt matrix.
        entropies: entanglement entropy of each bond, nats.
        normalised: entropies over the logarithm of the largest possible rank of that bond.
    """

    name: str
    spec: MPOSpec
    norms: list[float]
    weight_norm: float
    entropies: list[float]
    normalised: list[float]


def tensorized_layers(
    model: nn.Module,
) -> Iterator[tuple[str, TensorizedLinear | TensorizedEmbedding]]:
    """Yield every tensorized layer of `model` with its logical name."""
    for name, module in model.named_modules():
        if isinstance(module, TensorizedLinear | TensorizedEmbedding):
            yield name, module


@torch.no_grad()
def model_spectra(model: nn.Module) -> list[SiteSpectrum]:
    """Return the spectrum of every tensorized layer.

    The singular values of each unfolding come from orthogonal sweeps over the cores in float64 on
    the CPU; no matrix is rebuilt, and the result does not depend on the device.
    """
    result = []
    for name, layer in tensorized_layers(model):
        cores = [core.detach().to("cpu", torch.float64) for core in layer.cores]
        spectra = bond_spectra(cores)
        result.append(
            SiteSpectrum(
                name=name,
                spec=layer.spec,
                norms=core_norms(cores),
                weight_norm=float(torch.linalg.vector_norm(spectra[0])),
                entropies=[entanglement_entropy(values) for values in spectra],
                normalised=normalised_entropies(spectra),
            )
        )
    return result
