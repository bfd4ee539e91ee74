"""Encoders like BERT and ALBERT: sizes, sites, parameter counts, known without torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Literal

from mpotrain.models.network import (
    NetworkConfig,
    Objective,
    head_problems,
    positive_problems,
    size_problems,
)
from mpotrain.models.sites import ParameterInfo, Site, site_parameters
from mpotrain.nn.config import DenseSite, SiteConfig
from mpotrain.nn.moe.config import MoEConfig
from mpotrain.nn.sharing_config import (
    BLOCK_FAMILIES,
    AdapterConfig,
    SharingConfig,
    StartConfig,
)
from mpotrain.sample import SampleLengths
from mpotrain.schema import collect_problems, config, sound_or

SITE_NAMES = ("embedding", *BLOCK_FAMILIES)
"""Families of `EncoderSites`."""
SIZE_KEYS = (
    "vocab_size",
    "context_length",
    "hidden_size",
    "num_layers",
    "num_heads",
    "ffn_size",
    "num_token_types",
)
MODULES = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "attention_out": "attention.out",
    "c_fc": "ffn.c_fc",
    "c_proj": "ffn.c_proj",
}
"""Module of each family in its block."""
BLOCK_NORMS = ("attention_norm", "ffn_norm")
DEEPNORM_FAMILIES = ("value", "attention_out", "c_fc", "c_proj")
"""Families that DeepNorm starts smaller."""


@config
class EncoderSites:
    """Representation of each family of weight matrices."""

    embedding: SiteConfig = DenseSite()
    """Token embedding (vocabulary x embedding size), shared with the output layer."""
    query: SiteConfig = DenseSite()
    """Query projection (hidden x hidden)."""
    key: SiteConfig = DenseSite()
    """Key projection (hidden x hidden)."""
    value: SiteConfig = DenseSite()
    """Value projection (hidden x hidden)."""
    attention_out: SiteConfig = DenseSite()
    """Output projection of attention (hidden x hidden)."""
    c_fc: SiteConfig = DenseSite()
    """First feed-forward matrix (hidden x ffn)."""
    c_proj: SiteConfig = DenseSite()
    """Second feed-forward matrix (ffn x hidden)."""


@config
class EncoderConfig(NetworkConfig):
    """Bidirectional encoder (Devlin et al. 2019; Lan et al. 2020; Liu et al. 2023)."""

    objectives: ClassVar[tuple[Objective, ...]] = ("masked",)
    kind: Literal["encoder"] = "encoder"
    vocab_size: int
    """Number of token ids; the ids of masks and marks are among them."""
    context_length: int
    """Number of learned positions; the longest sequence."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Number of layers, shared ones counted as often as they are used."""
    num_heads: int
    """Attention heads; must divide the hidden size."""
    ffn_size: int
    """Width of the feed-forward layer."""
    embedding_size: int | None = None
    """Width of the embeddings, mapped to the hidden size by one more matrix (ALBERT: 128); absent:
    the hidden size, without a mapping."""
    num_token_types: int = 2
    """Segments that a sequence may have."""
    norm: Literal["post", "pre"] = "post"
    """Where layers are normalised: after the residual sum (BERT, ALBERT), or before each part."""
    norm_eps: float = 1e-12
    """Added to the variance in every layer normalisation."""
    activation: Literal["gelu_tanh", "gelu", "relu"] = "gelu_tanh"
    """Activation of the feed-forward layers and of the head that predicts tokens."""
    pair_head: bool = True
    """Pooler and classifier for the order of two segments (Lan et al. 2020, section 3.1)."""
    dropout: float = 0.1
    """Dropout after embeddings, attention output and feed-forward output."""
    attention_dropout: float = 0.1
    """Dropout of attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of every weight matrix at start."""
    activation_checkpointing: bool = False
    """Recompute the layers in the backward pass instead of keeping their activations."""
    sites: EncoderSites = EncoderSites()
    """Representation of each family of weight matrices."""
    sharing: SharingConfig = SharingConfig()
    """What layers share."""
    adapter: AdapterConfig | None = None
    """Low-rank additions of each layer's own; absent = none."""
    start: StartConfig = StartConfig()
    """Start values of deep networks."""

    @property
    def moe(self) -> MoEConfig | None:
        """None: encoders have no mixtures of experts."""
        return None

    @property
    def embedding_width(self) -> int:
        """Width E of the embeddings."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def num_blocks(self) -> int:
        """Number of blocks with parameters of their own (groups, where blocks are shared)."""
        return self.sharing.groups if self.sharing.scope == "all" else self.num_layers

    def group(self, layer: int) -> int:
        """Return the group of consecutive layers that a layer belongs to."""
        return layer * self.sharing.groups // self.num_layers

    def block(self, layer: int) -> int:
        """Return the number of the block that computes a layer."""
        return self.group(layer) if self.sharing.scope == "all" else layer

    @property
    def longest_sequence(self) -> int:
        """Number of learned positions."""
        return self.context_length

    def site_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape (in, out) of each family that may be tensorized."""
        hidden, ffn = self.hidden_size, self.ffn_size
        square = dict.fromkeys(BLOCK_FAMILIES[:4], (hidden, hidden))
        embedding = {"embedding": (self.vocab_size, self.embedding_width)}
        return embedding | square | {"c_fc": (hidden, ffn), "c_proj": (ffn, hidden)}

    def site_std(self, family: str) -> float:
        """Return the standard deviation at start of the matrices of a family."""
        return self.init_std * self.start_gain(family)

    def start_gain(self, family: str) -> float:
        """Return the factor of DeepNorm on the start values of a family, whoever draws them."""
        if self.start.deepnorm and family in DEEPNORM_FAMILIES:
            return float((8 * self.num_layers) ** -0.25)
        return 1.0

    def banked_families(self) -> tuple[str, ...]:
        """Return the families whose central tensors layers share."""
        if self.sharing.scope != "central":
            return ()
        return tuple(f for f in BLOCK_FAMILIES if getattr(self.sites, f).kind != "dense")

    def ties_vectors(self) -> bool:
        """Return whether the layers of a group share biases and norms."""
        return self.sharing.scope == "central" and self.sharing.vectors == "tied"

    def mixtures(self) -> list[str]:
        """Return no names: encoders have no mixtures of experts."""
        return []

    def all_sites(self) -> list[Site]:
        """Return every weight matrix, in the order of the forward pass within a family."""
        hidden, width = self.hidden_size, self.embedding_width
        dense = DenseSite()
        choice = self.sites.embedding
        spec = choice.spec(self.vocab_size, width)
        sites = [
            Site(
                "token_embedding", "embedding", self.vocab_size, width, choice, spec, False,
                stream="predicted",
            )
        ]  # fmt: skip
        if self.embedding_size is not None:
            sites.append(Site("embedding_map", "embedding_map", width, hidden, dense, None, True))
        for family in BLOCK_FAMILIES:
            sites += self._block_sites(family)
        if self.pair_head:
            sites += [
                Site("pooler", "pooler", hidden, hidden, dense, None, True, stream="pairs"),
                Site(
                    "pair_head", "pair_head", hidden, 2, dense, None, True, stream="pairs",
                    is_head=True,
                ),
            ]  # fmt: skip
        transform = Site(
            "mlm_head.transform", "mlm_transform", hidden, width, dense, None, True,
            stream="predicted", is_head=True,
        )  # fmt: skip
        return [*sites, transform]

    def _block_sites(self, family: str) -> list[Site]:
        shape, choice = self.site_shapes()[family], getattr(self.sites, family)
        banked, bias = family in self.banked_families(), choice.bias and not self.ties_vectors()
        spec = choice.spec(*shape)
        return [
            Site(
                f"blocks.{block}.{MODULES[family]}", family, *shape, choice, spec, bias,
                calls=self.num_layers // self.num_blocks,
                bank=f"bank.{family}.{self.group(block)}" if banked else None,
            )
            for block in range(self.num_blocks)
        ]  # fmt: skip

    def parameters(self) -> Iterator[ParameterInfo]:
        """Yield every parameter of the model, without building it."""
        width = self.embedding_width
        shape = (self.context_length, width)
        yield ParameterInfo("position_embedding", shape, "dense", None, part="positions")
        shape = (self.num_token_types, width)
        yield ParameterInfo("type_embedding", shape, "dense", None, part="positions")
        for site in self.all_sites():
            yield from site_parameters(site)
        yield from self._shared_parameters()
        yield from self._adapters()
        norms = {"embedding_norm": width}
        if self.norm == "pre":
            norms["final_norm"] = self.hidden_size
        if not self.ties_vectors():
            blocks = range(self.num_blocks)
            norms |= {f"blocks.{n}.{k}": self.hidden_size for n in blocks for k in BLOCK_NORMS}
        for name, size in norms.items():
            yield ParameterInfo(f"{name}.weight", (size,), "dense", None)
            yield ParameterInfo(f"{name}.bias", (size,), "dense", None)
        for leaf in ("weight", "bias"):
            name = f"mlm_head.norm.{leaf}"
            yield ParameterInfo(name, (width,), "dense", None, part="heads", is_head=True)
        name, entries = "mlm_head.bias", (self.vocab_size,)
        yield ParameterInfo(name, entries, "dense", None, part="heads", is_head=True)

    def _shared_parameters(self) -> Iterator[ParameterInfo]:
        """Yield the central tensors of the bank, and the tied biases and norms."""
        banked = self.banked_families()
        for family in banked:
            spec = getattr(self.sites, family).spec(*self.site_shapes()[family])
            for group in range(self.sharing.groups):
                name = f"bank.{family}.{group}"
                shape = spec.core_shapes[spec.central_index]
                first = group * self.num_layers // self.sharing.groups
                site = f"blocks.{first}.{MODULES[family]}"
                yield ParameterInfo(name, shape, "central", site)
        if not self.ties_vectors():
            return
        for group in range(self.sharing.groups):
            for family in BLOCK_FAMILIES:
                if getattr(self.sites, family).bias:
                    size = (self.site_shapes()[family][1],)
                    name = f"tied.{group}.{family}_bias"
                    yield ParameterInfo(name, size, "dense", None, part="biases")
            for norm in BLOCK_NORMS:
                for leaf in ("weight", "bias"):
                    name = f"tied.{group}.{norm}_{leaf}"
                    yield ParameterInfo(name, (self.hidden_size,), "dense", None)

    def _adapters(self) -> Iterator[ParameterInfo]:
        if self.adapter is None:
            return
        rank, shapes = self.adapter.rank, self.site_shapes()
        for layer in range(self.num_layers):
            for family in self.adapter.families:
                rows, columns = shapes[family]
                name = f"adapters.{layer}.{family}"
                yield ParameterInfo(f"{name}.u", (rows, rank), "adapter", None, part="adapters")
                yield ParameterInfo(f"{name}.d", (rank, columns), "adapter", None, part="adapters")

    def attention_flops(self, lengths: SampleLengths) -> int:
        """Return FLOPs of scores and weighted values of a sample, forward and backward."""
        return 12 * self.num_layers * self.hidden_size * lengths.inputs**2

    def adapter_flops(self, lengths: SampleLengths) -> int:
        """Return FLOPs of the adapters of all layers for a sample, forward and backward."""
        if self.adapter is None:
            return 0
        shapes = self.site_shapes()
        weights = self.adapter.rank * sum(sum(shapes[family]) for family in self.adapter.families)
        return 6 * self.num_layers * weights * lengths.inputs

    def problems(self, where: str) -> list[str]:
        """Return everything that makes this model impossible, one line each.

        Args:
            where: dotted key of this section, at the head of every line.
        """
        layers = sound_or(lambda: self.num_layers, 0)
        # Beside a wrong size all checks go on that do not need it.
        return [
            *size_problems(self, where, SIZE_KEYS, ("dropout", "attention_dropout")),
            *positive_problems(self, where, ("init_std", "norm_eps")),
            *collect_problems(
                lambda: self._embedding_problems(where),
                lambda: head_problems(self.hidden_size, self.num_heads, where),
                lambda: self.sharing.problems(f"{where}.sharing", layers),
                lambda: self.start.problems(f"{where}.start", layers),
                lambda: self._adapter_problems(f"{where}.adapter"),
                *(partial(self._site_problems, where, family) for family in SITE_NAMES),
                lambda: self._central_problems(where),
                lambda: self._scale_problems(where),
                lambda: self._unscaled_problems(where),
                lambda: self._deepnorm_problems(where),
            ),
        ]

    def _embedding_problems(self, where: str) -> list[str]:
        if self.embedding_size is None or self.embedding_size >= 1:
            return []
        return [f"{where}.embedding_size: must be at least 1, is {self.embedding_size}"]

    def _adapter_problems(self, where: str) -> list[str]:
        if self.adapter is None:
            return []
        none: dict[str, tuple[int, int]] = {}
        shapes = sound_or(self.site_shapes, none)
        shapes = {family: shape for family, shape in shapes.items() if min(shape) >= 1}
        return self.adapter.problems(where, shapes)

    def _tensorized(self) -> list[str]:
        return [f for f in BLOCK_FAMILIES if getattr(self.sites, f).kind != "dense"]

    def _central_problems(self, where: str) -> list[str]:
        if self.sharing.scope != "central" or self._tensorized():
            return []
        return [
            f'{where}.sharing.scope: "central", but every family of {where}.sites is dense and '
            "has no central tensor; tensorize some, or share whole blocks (scope all)"
        ]

    def _scale_problems(self, where: str) -> list[str]:
        if self.start.auxiliary_scale == "none" or self._tensorized():
            return []
        return [
            f"{where}.start.auxiliary_scale: {self.start.auxiliary_scale}, but no family of "
            f"{where}.sites has auxiliary tensors"
        ]

    def _unscaled_problems(self, where: str) -> list[str]:
        together = self.num_layers // self.num_blocks if self._has_equal_groups() else 1
        if self.start.unscaled_layers % together == 0:
            return []
        return [
            f"{where}.start.unscaled_layers: {self.start.unscaled_layers}, but {together} "
            "layers in a row share all weights; take a multiple of that"
        ]

    def _deepnorm_problems(self, where: str) -> list[str]:
        if not self.start.deepnorm or self.norm != "pre":
            return []
        return [f'{where}.start.deepnorm: belongs to {where}.norm="post"']

    def _has_equal_groups(self) -> bool:
        groups = self.sharing.groups
        return min(groups, self.num_layers) >= 1 and self.num_layers % groups == 0
