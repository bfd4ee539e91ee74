"""The weights of a trained encoder laid into another one, whatever their layers share.

A fully shared dense model (ALBERT) becomes one with a shared central tensor and auxiliary tensors
of each layer's own (MPOBERT, Liu et al. 2023, section 3.3): each family is decomposed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mpotrain.convert.depth import DepthMap, Origin
from mpotrain.convert.matrices import (
    Matrices,
    SiteError,
    core_values,
    decomposed,
    matrix_values,
    same_cores,
    vector,
)
from mpotrain.models.depth_start import auxiliary_scaling, depth_shared_tensors
from mpotrain.models.encoder_config import MODULES, EncoderConfig
from mpotrain.models.sites import Site
from mpotrain.nn.sharing_config import BLOCK_FAMILIES
from mpotrain.tensor.spec import MPOSpec

Cores = tuple[Tensor, ...]


class EncoderFill:
    """Makes the tensors of the layers of one encoder of those of another.

    Attributes:
        values: tensors by logical name.
        errors: what each decomposed matrix has lost.
    """

    def __init__(
        self,
        config: EncoderConfig,
        source: EncoderConfig,
        weights: Mapping[str, Tensor],
        drawn: Mapping[str, Tensor],
    ) -> None:
        """Fill the layers.

        Args:
            config: of the new encoder, which nothing speaks against (`encoder_problems`).
            source: of the trained one.
            weights: of the trained one.
            drawn: start values of the new one.
        """
        self.values: dict[str, Tensor] = {}
        self.errors: list[SiteError] = []
        self._map = DepthMap(source, config)
        # Depth scaling is a start: layers that were trained on their own keep their size.
        plain = replace(config, start=replace(config.start, auxiliary_scale="none"))
        self._config = config if self._map.unrolls else plain
        self._matrices, self._weights = Matrices(source, weights), weights
        self._sites = {site.name: site for site in config.all_sites()}
        self._known: dict[Origin, Cores] = {}
        sizes = {info.name: info.size for info in config.parameters()}
        for name, theirs in self._map.vectors().items():
            self.values[name] = vector(weights, next(iter(theirs)), sizes[name])
        for family in BLOCK_FAMILIES:
            if family not in config.banked_families():
                self._own(family)
            elif self._map.keeps_bank(family):
                self._kept(family)
            else:
                self._banked(family)
        if self._map.draws:
            self.values |= self._drawn(drawn)
        if self._map.keeps_adapters:
            kept = [name for name in weights if name.startswith("adapters.")]
            self.values |= {name: weights[name] for name in kept}

    def _own(self, family: str) -> None:
        """Fill matrices that share nothing, or whole."""
        for block, (origin, *_) in self._map.block_origins(family).items():
            site = self._site(block, family)
            if site.spec is None:
                self.values |= matrix_values(site, self._matrix(origin))[0]
                continue
            cores = list(self._cores(origin, site, site.spec))
            factors = iter(auxiliary_scaling(self._config, site.spec, block))
            for k in range(len(cores)):
                if k != site.spec.central_index:
                    cores[k] = cores[k] * next(factors)
            self.values |= core_values(site, tuple(cores))

    def _drawn(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the auxiliary tensors of the deeper layers as they were drawn, scaled already."""
        config, found = self._config, {}
        for info in config.parameters():
            if info.role == "auxiliary" and info.name.startswith("blocks."):
                block = int(info.name.split(".")[1])
                if block >= config.start.unscaled_layers:
                    found[info.name] = drawn[info.name]
        return found

    def _kept(self, family: str) -> None:
        """Copy shared central tensors and the auxiliary tensors of all layers."""
        for name, (theirs, *_) in self._map.banks(family).items():
            self.values[name] = self._weights[theirs]
        for block in range(self._config.num_blocks):
            site = self._site(block, family)
            names = [n for n in self._weights if n.startswith(f"{site.name}.auxiliaries.")]
            self.values |= {name: self._weights[name] for name in names}

    def _banked(self, family: str) -> None:
        """Decompose the one matrix of a group, and copy its cores to all of its layers."""
        config = self._config
        for group, (origin, *_) in self._map.group_origins(family).items():
            blocks = [n for n in range(config.num_blocks) if config.group(n) == group]
            site = self._site(blocks[0], family)
            assert site.spec is not None
            tensors = depth_shared_tensors(config, family, self._cores(origin, site, site.spec))
            wanted = tuple(f"{self._site(block, family).name}." for block in blocks)
            self.values |= {
                name: tensor
                for name, tensor in tensors.items()
                if name == site.bank or name.startswith(wanted)
            }

    def _site(self, block: int, family: str) -> Site:
        return self._sites[f"blocks.{block}.{MODULES[family]}"]

    def _cores(self, origin: Origin, site: Site, spec: MPOSpec) -> Cores:
        """Return a matrix of the source as cores of a spec, decomposing it once."""
        if origin not in self._known:
            cores = self._matrices.cores(origin.site)
            same = same_cores(self._matrices.sites[origin.site].spec, spec)
            if cores is None or not same or origin.adapter is not None:
                cores, error = decomposed(site.name, self._matrix(origin), spec)
                self.errors.append(error)
            self._known[origin] = cores
        return self._known[origin]

    def _matrix(self, origin: Origin) -> Tensor:
        """Return a matrix of the source (in, out), with its adapter where that is folded in."""
        weight = self._matrices.matrix(origin.site)
        if origin.adapter is None:
            return weight
        u, d = (self._weights[f"{origin.adapter}.{leaf}"].double() for leaf in ("u", "d"))
        return (weight.double() + u @ d).float()
