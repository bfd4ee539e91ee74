"""Layers built from sites: the same start values whatever the rest of the network is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from mpotrain.models.sites import Site
from mpotrain.nn.activation import ActivationName
from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.nn.linear import DenseEmbedding, DenseLinear, TensorizedEmbedding, TensorizedLinear
from mpotrain.nn.moe.config import AsymmetricExpertSite, MoEConfig, MPOExpertSite
from mpotrain.nn.moe.dispatch import LocalDispatcher
from mpotrain.nn.moe.experts import DenseExperts, MPOExperts
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.moe.router import Router
from mpotrain.parallel.seeds import start_seed


class StartSpread(Protocol):
    """What a builder asks the configuration of a network."""

    def site_std(self, family: str) -> float:
        """Return the standard deviation at start of the matrices of a family."""


class SiteBuilder:
    """Builds the layers of a network from its sites.

    Every parameter is drawn from its own generator, seeded by (seed, logical name): adding or
    changing one site leaves the start values of all others as they were.
    """

    def __init__(self, config: StartSpread, seed: int) -> None:
        """Prepare a builder.

        Args:
            config: says how far the start values of each family spread.
            seed: of the start weights.
        """
        self._config, self._seed = config, seed

    def generator(self, name: str) -> torch.Generator:
        """Return the generator of one parameter or layer."""
        return torch.Generator().manual_seed(start_seed(self._seed, name))

    def std(self, site: Site) -> float:
        """Return the standard deviation at start of the matrix of a site."""
        return self._config.site_std(site.family)

    def embedding(self, site: Site) -> DenseEmbedding | TensorizedEmbedding:
        """Build a token embedding that is also the output layer."""
        std, generator = self.std(site), self.generator(site.name)
        if isinstance(site.choice, MPOSite | TTMSite) and site.spec is not None:
            return TensorizedEmbedding(site.spec, site.choice, std=std, generator=generator)
        return DenseEmbedding(site.in_features, site.out_features, std=std, generator=generator)

    def linear(self, site: Site) -> DenseLinear | TensorizedLinear:
        """Build a linear layer."""
        std, generator = self.std(site), self.generator(site.name)
        if isinstance(site.choice, MPOSite | TTMSite) and site.spec is not None:
            return TensorizedLinear(
                site.spec, site.choice, bias=site.bias, std=std, generator=generator
            )
        return DenseLinear(
            site.in_features, site.out_features, bias=site.bias, std=std, generator=generator
        )

    def experts(self, site: Site) -> DenseExperts | MPOExperts:
        """Build one matrix of all experts of a mixture."""
        std, generator = self.std(site), self.generator(site.name)
        if isinstance(site.choice, MPOExpertSite | AsymmetricExpertSite) and site.spec is not None:
            return MPOExperts(
                site.spec,
                site.choice,
                site.num_experts,
                bias=site.bias,
                std=std,
                generator=generator,
            )
        return DenseExperts(
            site.in_features,
            site.out_features,
            site.num_experts,
            bias=site.bias,
            std=std,
            generator=generator,
        )

    def mixture(
        self,
        moe: MoEConfig,
        name: str,
        sites: Mapping[str, Site],
        activation: ActivationName = "gelu_tanh",
    ) -> MixtureOfExperts:
        """Build a mixture of experts that dispatches within the process.

        Args:
            moe: the section.
            name: logical name of the mixture.
            sites: all sites of the network by name.
            activation: between the two matrices of an expert.
        """
        router = sites[f"{name}.router"]
        return MixtureOfExperts(
            Router(
                router.in_features,
                moe.num_experts,
                moe.router,
                std=self.std(router),
                generator=self.generator(router.name),
            ),
            self.experts(sites[f"{name}.c_fc"]),
            self.experts(sites[f"{name}.c_proj"]),
            LocalDispatcher(moe.num_experts),
            activation,
        )
