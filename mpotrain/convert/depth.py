"""Which tensors of one encoder the layers of another are made of, known without any weight.

Layers may share everything, central tensors or nothing, on either side. A tensor that several
layers of the new encoder use must have one origin, whatever they share.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpotrain.convert.matrices import same_cores
from mpotrain.models.encoder_config import BLOCK_NORMS, MODULES, EncoderConfig
from mpotrain.nn.sharing_config import BLOCK_FAMILIES


@dataclass(frozen=True)
class Origin:
    """A matrix of a layer of the source.

    Attributes:
        site: name of its site.
        adapter: name of the adapter that is added to it; None where there is none, or where the
            new encoder has it too.
    """

    site: str
    adapter: str | None = None


Places = dict[str, dict[str, None]]
"""Names in the new encoder, each with the names in the source that layers want it to be."""


class DepthMap:
    """Goes through two encoders layer by layer.

    Attributes:
        folds: whether adapters of the source are added to its matrices.
        deepens: whether the encoders differ in their number of layers.
        unrolls: whether layers that were one and the same become layers of their own, which is
            where depth scaling applies.
    """

    def __init__(self, source: EncoderConfig, target: EncoderConfig) -> None:
        """Compare two encoders of the same sizes.

        Args:
            source: the trained one.
            target: the one to fill.
        """
        self.source, self.target = source, target
        self.folds = source.adapter is not None and not self.keeps_adapters
        self.deepens = source.num_layers != target.num_layers
        self.unrolls = source.sharing.scope == "all" and target.sharing.scope != "all"

    @property
    def keeps_adapters(self) -> bool:
        """Whether the adapters of both have the same shapes."""
        old, new = self.source.adapter, self.target.adapter
        if old is None or new is None:
            return False
        return old.rank == new.rank and set(old.families) == set(new.families)

    @property
    def is_scaled(self) -> bool:
        """Whether auxiliary tensors are scaled with the depth, so that outputs change."""
        start = self.target.start
        tensorized = any(getattr(self.target.sites, f).kind != "dense" for f in BLOCK_FAMILIES)
        is_deep = start.unscaled_layers < self.target.num_layers
        return self.unrolls and tensorized and start.auxiliary_scale != "none" and is_deep

    @property
    def draws(self) -> bool:
        """Whether deeper layers keep the auxiliary tensors that they were drawn with."""
        tensorized = any(getattr(self.target.sites, f).kind != "dense" for f in BLOCK_FAMILIES)
        start = self.target.start
        is_deep = start.unscaled_layers < self.target.num_layers
        return self.unrolls and tensorized and start.deeper == "drawn" and is_deep

    def source_layer(self, layer: int) -> int:
        """Return the layer of the source that a layer is made of: the one at the same height."""
        return layer * self.source.num_layers // self.target.num_layers

    def origin(self, layer: int, family: str) -> Origin:
        """Return what the matrix of a layer of the new encoder is made of."""
        old = self.source_layer(layer)
        site = site_name(self.source, old, family)
        adapter = self.source.adapter
        if adapter is None or not self.folds or family not in adapter.families:
            return Origin(site)
        return Origin(site, f"adapters.{old}.{family}")

    def block_origins(self, family: str) -> dict[int, list[Origin]]:
        """Return the different origins of the matrix of a family, for each block."""
        found: dict[int, dict[Origin, None]] = {}
        for layer in range(self.target.num_layers):
            block = self.target.block(layer)
            found.setdefault(block, {})[self.origin(layer, family)] = None
        return {block: list(origins) for block, origins in found.items()}

    def group_origins(self, family: str) -> dict[int, list[Origin]]:
        """Return the different origins of the matrices of a family, for each group."""
        found: dict[int, dict[Origin, None]] = {}
        for layer in range(self.target.num_layers):
            group = self.target.group(layer)
            found.setdefault(group, {})[self.origin(layer, family)] = None
        return {group: list(origins) for group, origins in found.items()}

    def keeps_bank(self, family: str) -> bool:
        """Whether a family has the same shared central tensors and auxiliary tensors in both."""
        if family not in self.source.banked_families() or self.deepens:
            return False
        adapter = self.source.adapter
        folded = self.folds and adapter is not None and family in adapter.families
        theirs, ours = (
            getattr(config.sites, family).spec(*config.site_shapes()[family])
            for config in (self.source, self.target)
        )
        return same_cores(theirs, ours) and not folded

    def banks(self, family: str) -> Places:
        """Return the central tensors of the source for each of the new encoder's of a family."""
        found: Places = {}
        for layer in range(self.target.num_layers):
            theirs = f"bank.{family}.{self.source.group(self.source_layer(layer))}"
            found.setdefault(f"bank.{family}.{self.target.group(layer)}", {})[theirs] = None
        return found

    def vectors(self) -> dict[str, dict[str | None, None]]:
        """Return the biases and norms of the source for each of the new encoder's; None = none."""
        found: dict[str, dict[str | None, None]] = {}
        for layer in range(self.target.num_layers):
            old = self.source_layer(layer)
            for family in BLOCK_FAMILIES:
                ours = bias_name(self.target, layer, family)
                if ours is not None:
                    theirs = bias_name(self.source, old, family)
                    found.setdefault(ours, {})[theirs] = None
            for norm in BLOCK_NORMS:
                for leaf in ("weight", "bias"):
                    ours = norm_name(self.target, layer, norm, leaf)
                    theirs = norm_name(self.source, old, norm, leaf)
                    found.setdefault(ours, {})[theirs] = None
        return found


def site_name(config: EncoderConfig, layer: int, family: str) -> str:
    """Return the name of the site of a matrix of a layer."""
    return f"blocks.{config.block(layer)}.{MODULES[family]}"


def bias_name(config: EncoderConfig, layer: int, family: str) -> str | None:
    """Return the name of the bias of a matrix of a layer; None without one."""
    if not getattr(config.sites, family).bias:
        return None
    if config.ties_vectors():
        return f"tied.{config.group(layer)}.{family}_bias"
    return f"{site_name(config, layer, family)}.bias"


def norm_name(config: EncoderConfig, layer: int, norm: str, leaf: str) -> str:
    """Return the name of a vector of a norm of a layer."""
    if config.ties_vectors():
        return f"tied.{config.group(layer)}.{norm}_{leaf}"
    return f"blocks.{config.block(layer)}.{norm}.{leaf}"
