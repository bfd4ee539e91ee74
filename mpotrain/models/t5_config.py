"""T5 v1.0: sizes, sites, parameter counts, known without torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Literal

from mpotrain.models.network import (
    FEED_FORWARD,
    NetworkConfig,
    Objective,
    positive_problems,
    size_problems,
)
from mpotrain.models.sites import ParameterInfo, Site, site_parameters
from mpotrain.nn.config import DenseSite, SiteConfig
from mpotrain.nn.moe.config import MoEConfig
from mpotrain.sample import SampleLengths, Stream
from mpotrain.schema import collect_problems, config, known_size

SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "head_size",
    "num_layers",
    "num_heads",
    "ffn_size",
    "relative_buckets",
    "relative_distance",
)
ATTENTION = ("query", "key", "value", "attention_out")
SITE_NAMES = ("embedding", *ATTENTION, *FEED_FORWARD)
"""Families of `T5Sites`."""
MODULES = {"query": "query", "key": "key", "value": "value", "attention_out": "out"}


@config
class T5Sites:
    """Representation of each family of weight matrices; T5 has no bias vectors whatever is set."""

    embedding: SiteConfig = DenseSite()
    """Token embedding (vocabulary x hidden), shared by encoder, decoder and the output layer."""
    query: SiteConfig = DenseSite()
    """Query projections (hidden x heads of all three kinds of attention)."""
    key: SiteConfig = DenseSite()
    """Key projections."""
    value: SiteConfig = DenseSite()
    """Value projections."""
    attention_out: SiteConfig = DenseSite()
    """Output projections of attention (heads x hidden)."""
    c_fc: SiteConfig = DenseSite()
    """First feed-forward matrix (hidden x ffn)."""
    c_proj: SiteConfig = DenseSite()
    """Second feed-forward matrix (ffn x hidden)."""


@config
class T5Config(NetworkConfig):
    """Encoder and decoder of T5 v1.0 (Raffel et al. 2020): relative positions, RMS norm, ReLU."""

    objectives: ClassVar[tuple[Objective, ...]] = ("span_corruption",)
    kind: Literal["t5"] = "t5"
    vocab_size: int
    """Number of token ids; the sentinels are among them."""
    hidden_size: int
    """Width of the residual stream."""
    head_size: int = 64
    """Width of an attention head; heads need not make up the hidden size."""
    num_layers: int
    """Blocks of the encoder."""
    num_decoder_layers: int | None = None
    """Blocks of the decoder; absent: as many as in the encoder."""
    num_heads: int
    """Attention heads."""
    ffn_size: int
    """Width of the feed-forward layer."""
    relative_buckets: int = 32
    """Buckets of distances, each with a learned bias for every head."""
    relative_distance: int = 128
    """Distance from which on all share the last bucket."""
    dropout: float = 0.1
    """Dropout after embeddings, in attention, in and after the feed-forward layer."""
    norm_eps: float = 1e-6
    """Added to the mean square in every normalisation."""
    init_factor: float = 1.0
    """Factor on the standard deviation of every matrix at start (that of the T5 code)."""
    activation_checkpointing: bool = False
    """Recompute the blocks in the backward pass instead of keeping their activations."""
    sites: T5Sites = T5Sites()
    """Representation of each family of weight matrices."""
    moe: MoEConfig | None = None
    """Mixtures of experts in place of feed-forward layers, in encoder and decoder alike."""

    @property
    def longest_sequence(self) -> None:
        """None: relative positions have no end."""
        return

    @property
    def inner_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_size

    @property
    def stacks(self) -> dict[str, int]:
        """Blocks of the encoder and of the decoder."""
        decoder = self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers
        return {"encoder": self.num_layers, "decoder": decoder}

    def site_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape (in, out) of each family that may be tensorized."""
        hidden, inner, ffn = self.hidden_size, self.inner_size, self.ffn_size
        return {
            "embedding": (self.vocab_size, hidden),
            "query": (hidden, inner),
            "key": (hidden, inner),
            "value": (hidden, inner),
            "attention_out": (inner, hidden),
            "c_fc": (hidden, ffn),
            "c_proj": (ffn, hidden),
        }

    def site_std(self, family: str) -> float:
        """Return the standard deviation at start of the matrices of a family (that of T5's code).

        Scores are not divided by the root of the head size; queries start smaller instead.

        Args:
            family: a family of `all_sites`.
        """
        leaf = family.removeprefix("encoder_").removeprefix("decoder_").removeprefix("cross_")
        leaf = leaf.removeprefix("expert_")
        fan = {
            "embedding": 1,
            "query": self.hidden_size * self.head_size,
            "attention_out": self.inner_size,
            "c_proj": self.ffn_size,
        }
        return self.init_factor * float(fan.get(leaf, self.hidden_size) ** -0.5)

    def mixture_layers(self, stack: Literal["encoder", "decoder"]) -> list[int]:
        """Return the numbers (from 0) of the blocks of a stack that have a mixture."""
        return [] if self.moe is None else self.moe.layers(self.stacks[stack])

    def mixtures(self) -> list[str]:
        """Return the logical names of the mixtures, in the order of their statistics."""
        return [
            f"{stack}.blocks.{layer}.ffn"
            for stack, depth in self.stacks.items()
            if self.moe is not None
            for layer in self.moe.layers(depth)
        ]

    def all_sites(self) -> list[Site]:
        """Return every weight matrix, in the order of the forward pass within a family."""
        choice, shape = self.sites.embedding, self.site_shapes()["embedding"]
        sites = [
            Site(
                "token_embedding", "embedding", *shape, choice, choice.spec(*shape), False,
                stream="targets",
            )
        ]  # fmt: skip
        for stack, depth in self.stacks.items():
            own: Stream = "inputs" if stack == "encoder" else "targets"
            owners = {stack: (own, own)}
            if stack == "decoder":
                # Keys and values of cross-attention are made of what the encoder returns.
                owners["cross"] = ("targets", "inputs")
            for kind, (queries, memory) in owners.items():
                module = "cross_attention" if kind == "cross" else "attention"
                for leaf in ATTENTION:
                    names = [f"{stack}.blocks.{n}.{module}.{MODULES[leaf]}" for n in range(depth)]
                    stream = memory if leaf in ("key", "value") else queries
                    sites += self._family(f"{kind}_{leaf}", leaf, names, stream)
            mixtures = set() if self.moe is None else set(self.moe.layers(depth))
            for leaf in FEED_FORWARD:
                names = [
                    f"{stack}.blocks.{n}.ffn.{leaf}" for n in range(depth) if n not in mixtures
                ]
                sites += self._family(f"{stack}_{leaf}", leaf, names, own)
        return sites if self.moe is None else sites + self._mixture_sites(self.moe)

    def _family(self, family: str, leaf: str, names: list[str], stream: Stream) -> list[Site]:
        choice, shape = getattr(self.sites, leaf), self.site_shapes()[leaf]
        spec = choice.spec(*shape) if names else None
        return [Site(name, family, *shape, choice, spec, False, stream=stream) for name in names]

    def _mixture_sites(self, moe: MoEConfig) -> list[Site]:
        bias, experts, top_k = moe.router.bias, moe.num_experts, moe.router.top_k
        streams: dict[str, Stream] = {"encoder": "inputs", "decoder": "targets"}
        found = []
        for mixture in self.mixtures():
            stream = streams[mixture.partition(".")[0]]
            choice = DenseSite(bias=bias)
            found.append(
                Site(
                    f"{mixture}.router", "router", self.hidden_size, experts, choice, None, bias,
                    stream=stream,
                )
            )  # fmt: skip
        for stack in streams:
            for leaf in FEED_FORWARD:
                shape, site = self.site_shapes()[leaf], getattr(moe, leaf)
                spec = site.spec(*shape)
                found += [
                    Site(
                        f"{mixture}.{leaf}", f"{stack}_expert_{leaf}", *shape, site, spec, False,
                        experts, top_k, streams[stack],
                    )
                    for mixture in self.mixtures()
                    if mixture.startswith(stack)
                ]  # fmt: skip
        return found

    def parameters(self) -> Iterator[ParameterInfo]:
        """Yield every parameter of the model, without building it."""
        for site in self.all_sites():
            yield from site_parameters(site)
        hidden = (self.hidden_size,)
        for stack, depth in self.stacks.items():
            shape = (self.relative_buckets, self.num_heads)
            name = f"{stack}.relative_bias.weight"
            yield ParameterInfo(name, shape, "dense", None, part="positions")
            norms = ["norm_1", "norm_2"] + (["norm_cross"] if stack == "decoder" else [])
            for layer in range(depth):
                for norm in norms:
                    yield ParameterInfo(
                        f"{stack}.blocks.{layer}.{norm}.weight", hidden, "dense", None
                    )
            yield ParameterInfo(f"{stack}.final_norm.weight", hidden, "dense", None)

    def attention_flops(self, lengths: SampleLengths) -> int:
        """Return FLOPs of scores and weighted values of a sample, forward and backward."""
        source, target, depth = lengths.inputs, lengths.targets, self.stacks
        encoder = 12 * depth["encoder"] * source**2
        # Self-attention of the decoder is causal: half of the scores.
        decoder = depth["decoder"] * (6 * target**2 + 12 * source * target)
        return self.inner_size * (encoder + decoder)

    def problems(self, where: str) -> list[str]:
        """Return everything that makes this model impossible, one line each.

        Args:
            where: dotted key of this section, at the head of every line.
        """
        # Beside a wrong size all checks go on that do not need it.
        return [
            *size_problems(self, where, SIZE_KEYS, ("dropout",)),
            *positive_problems(self, where, ("init_factor", "norm_eps")),
            *collect_problems(
                lambda: self._depth_problems(where),
                lambda: self._bucket_problems(where),
                lambda: self._mixture_problems(f"{where}.moe"),
                *(partial(self._useless_problems, where, family) for family in FEED_FORWARD),
                *(partial(self._site_problems, where, family) for family in SITE_NAMES),
            ),
        ]

    def _depth_problems(self, where: str) -> list[str]:
        depth = self.num_decoder_layers
        if depth is None or depth >= 1:
            return []
        return [f"{where}.num_decoder_layers: must be at least 1, is {depth}"]

    def _bucket_problems(self, where: str) -> list[str]:
        buckets, distance = self.relative_buckets, self.relative_distance
        if min(buckets, distance) < 1 or (buckets % 4 == 0 and distance > buckets // 2):
            return []
        return [
            f"{where}.relative_buckets: {buckets} must be a multiple of 4, and half of it below "
            f"{where}.relative_distance {distance}: a quarter counts single distances, a quarter "
            "larger ones, for each direction"
        ]

    def _mixture_problems(self, where: str) -> list[str]:
        if self.moe is None:
            return []
        return self.moe.problems(
            where,
            known_size(lambda: self.hidden_size),
            known_size(lambda: self.ffn_size),
            known_size(lambda: min(self.stacks.values())),
        )
