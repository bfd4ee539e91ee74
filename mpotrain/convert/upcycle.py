"""Experts that are copies of one matrix.

MPOE (Gao et al. 2022, arXiv 2203.01104, section 3) starts from a trained dense model: each
feed-forward matrix is decomposed once, the central tensor is kept once for all experts and the
auxiliary tensors are copied for each of them, so that the mixture computes what the dense layer
did. With dense experts it is the sparse upcycling of Komatsuzaki et al. 2022 (arXiv 2212.05055).
"""

from __future__ import annotations

from torch import Tensor

from mpotrain.convert.matrices import Matrices, SiteError, decomposed
from mpotrain.models.sites import Site


def expert_values(site: Site, source: Matrices) -> tuple[dict[str, Tensor], SiteError | None]:
    """Return all tensors of a site of a mixture, made of the matrix of that name in a dense model.

    Args:
        site: of a mixture.
        source: the dense model.

    Returns:
        Tensors by logical name, and what was lost; None where experts are dense.
    """
    values, error = _one_expert(site, source.matrix(site.name))
    if site.bias:
        values[f"{site.name}.bias"] = source.bias(site)
    for name, value in values.items():
        if not name.endswith(".central"):
            values[name] = value.expand(site.num_experts, *value.shape)
    return values, error


def _one_expert(site: Site, weight: Tensor) -> tuple[dict[str, Tensor], SiteError | None]:
    if site.spec is None:
        return {f"{site.name}.weight": weight}, None
    cores, error = decomposed(site.name, weight, site.spec)
    central = site.spec.central_index
    values = {f"{site.name}.central": cores[central]}
    for k, core in enumerate((*cores[:central], *cores[central + 1 :])):
        values[f"{site.name}.auxiliaries.{k}"] = core
    return values, error
