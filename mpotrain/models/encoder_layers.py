"""Builds what the layers of an encoder own and what they share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpotrain.models.building import SiteBuilder
from mpotrain.models.depth_start import auxiliary_scaling
from mpotrain.models.encoder_config import BLOCK_NORMS, MODULES, EncoderConfig
from mpotrain.models.sites import Site
from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.nn.deep_init import draw_operator, scale_operator, split_cores
from mpotrain.nn.encoder_block import EncoderBlock
from mpotrain.nn.linear import TensorizedLinear
from mpotrain.nn.sharing import Adapter, CentralBank, LayerLinear, SharedLinear
from mpotrain.nn.sharing_config import BLOCK_FAMILIES
from mpotrain.tensor.spec import MPOSpec

Draw = tuple[Tensor, list[Tensor]]
"""A central tensor and auxiliary tensors."""


class LayerBuilder:
    """Builds the bank, the blocks, tied vectors and adapters of one encoder."""

    def __init__(self, config: EncoderConfig, build: SiteBuilder) -> None:
        """Draw what is shared.

        Args:
            config: of the encoder.
            build: gives every parameter its generator.
        """
        self._config, self._build = config, build
        self._sites = {site.name: site for site in config.all_sites()}
        self._draws: dict[str, Draw] = {}

    def bank(self) -> CentralBank:
        """Build the bank: start values come from generators of the names in it."""
        groups = range(self._config.sharing.groups)
        first = {self._config.group(block): block for block in reversed(range(self._num_blocks))}
        centrals = {
            family: [self._shared_draw(self._site(first[group], family))[0] for group in groups]
            for family in self._config.banked_families()
        }
        return CentralBank(centrals)

    def blocks(self) -> nn.ModuleList:
        """Build all blocks with weights of their own."""
        return nn.ModuleList(self._block(block) for block in range(self._num_blocks))

    def tied(self) -> nn.ModuleList:
        """Build the biases and norms that the layers of a group share; empty without any."""
        groups = range(self._config.sharing.groups) if self._config.ties_vectors() else ()
        return nn.ModuleList(self._tied_vectors() for _ in groups)

    def adapters(self) -> nn.ModuleList:
        """Build the adapters of all layers; empty without any."""
        layers = range(self._config.num_layers if self._config.adapter is not None else 0)
        return nn.ModuleList(self._layer_adapters(layer) for layer in layers)

    @property
    def _num_blocks(self) -> int:
        return self._config.num_blocks

    def _site(self, block: int, family: str) -> Site:
        return self._sites[f"blocks.{block}.{MODULES[family]}"]

    def _block(self, block: int) -> EncoderBlock:
        config = self._config
        deep = config.start.deepnorm
        return EncoderBlock(
            {family: self._linear(self._site(block, family), block) for family in BLOCK_FAMILIES},
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            activation_name=config.activation,
            is_post_norm=config.norm == "post",
            owns_norms=not config.ties_vectors(),
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            residual_scale=float(2 * config.num_layers) ** 0.25 if deep else 1.0,
        )

    def _linear(self, site: Site, block: int) -> LayerLinear:
        if site.bank is not None:
            return self._shared_linear(site, block)
        layer = self._build.linear(site)
        if isinstance(layer, TensorizedLinear):
            scale_operator(list(layer.cores), self._missing_gain(site))
            _, auxiliaries = split_cores(list(layer.cores), layer.spec)
            self._scale(auxiliaries, layer.spec, block)
        return layer

    def _shared_linear(self, site: Site, block: int) -> SharedLinear:
        spec, choice = _operator(site)
        assert site.bank is not None
        if self._config.sharing.start == "copies":
            _, auxiliaries = self._shared_draw(site)
        else:
            _, auxiliaries = self._draw(site, site.name)
        layer = SharedLinear(spec, choice, auxiliaries, bias=site.bias, bank=site.bank)
        self._scale(list(layer.auxiliaries), spec, block)
        return layer

    def _shared_draw(self, site: Site) -> Draw:
        """Return the draw that a group's central tensor comes from, made once."""
        assert site.bank is not None
        if site.bank not in self._draws:
            self._draws[site.bank] = self._draw(site, site.bank)
        return self._draws[site.bank]

    def _draw(self, site: Site, name: str) -> Draw:
        """Draw an operator from the generator of a name."""
        spec, choice = _operator(site)
        draw = draw_operator(spec, choice, self._build.std(site), self._build.generator(name))
        central, auxiliaries = draw
        scale_operator([central, *auxiliaries], self._missing_gain(site))
        return draw

    def _missing_gain(self, site: Site) -> float:
        """Return the factor of DeepNorm that the initialiser of a site does not apply itself."""
        choice = site.choice
        reads_std = not isinstance(choice, MPOSite | TTMSite) or choice.init != "xavier"
        return 1.0 if reads_std else self._config.start_gain(site.family)

    @torch.no_grad()
    def _scale(self, auxiliaries: list[Tensor], spec: MPOSpec, block: int) -> None:
        factors = auxiliary_scaling(self._config, spec, block)
        for core, factor in zip(auxiliaries, factors, strict=True):
            core.mul_(factor)

    def _tied_vectors(self) -> nn.ParameterDict:
        config = self._config
        shapes = config.site_shapes()
        vectors = {
            f"{family}_bias": torch.zeros(shapes[family][1])
            for family in BLOCK_FAMILIES
            if getattr(config.sites, family).bias
        }
        for norm in BLOCK_NORMS:
            vectors[f"{norm}_weight"] = torch.ones(config.hidden_size)
            vectors[f"{norm}_bias"] = torch.zeros(config.hidden_size)
        return nn.ParameterDict({name: nn.Parameter(v) for name, v in vectors.items()})

    def _layer_adapters(self, layer: int) -> nn.ModuleDict:
        adapter, shapes = self._config.adapter, self._config.site_shapes()
        assert adapter is not None
        return nn.ModuleDict(
            {
                family: Adapter(
                    *shapes[family],
                    adapter.rank,
                    std=adapter.std,
                    generator=self._build.generator(f"adapters.{layer}.{family}"),
                )
                for family in adapter.families
            }
        )


def _operator(site: Site) -> tuple[MPOSpec, MPOSite | TTMSite]:
    if site.spec is None or not isinstance(site.choice, MPOSite | TTMSite):
        raise TypeError(f"{site.name} has a bank, but is no operator")
    return site.spec, site.choice
