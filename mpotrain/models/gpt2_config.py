"""GPT-2: sizes, sites and parameter counts, known without torch.

`all_sites()` lists every weight matrix; `parameters()` predicts every parameter with its logical
name, shape and role. Both feed `mpotrain plan` and build the modules; a test holds them equal to
`named_parameters()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Literal

from mpotrain.models.network import (
    FEED_FORWARD,
    NetworkConfig,
    Objective,
    head_problems,
    positive_problems,
    size_problems,
)
from mpotrain.models.sites import ParameterInfo, Site, site_parameters
from mpotrain.nn.config import DenseSite, SiteConfig
from mpotrain.nn.moe.config import MoEConfig
from mpotrain.sample import SampleLengths
from mpotrain.schema import collect_problems, config, known_size

SITE_NAMES = ("embedding", "qkv", "attention_out", "c_fc", "c_proj")
SIZE_KEYS = (
    "vocab_size",
    "context_length",
    "hidden_size",
    "num_layers",
    "num_heads",
    "ffn_size",
)
"""Keys of a model that are sizes."""


@config
class GPT2Sites:
    """Representation of each family of weight matrices."""

    embedding: SiteConfig = DenseSite()
    """Token embedding (vocabulary x hidden), shared with the output layer."""
    qkv: SiteConfig = DenseSite()
    """Fused query, key and value projection (hidden x 3 hidden)."""
    attention_out: SiteConfig = DenseSite()
    """Output projection of attention (hidden x hidden)."""
    c_fc: SiteConfig = DenseSite()
    """First feed-forward matrix (hidden x ffn)."""
    c_proj: SiteConfig = DenseSite()
    """Second feed-forward matrix (ffn x hidden)."""


@config
class GPT2Config(NetworkConfig):
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm, GELU, tied embedding."""

    objectives: ClassVar[tuple[Objective, ...]] = ("causal",)
    kind: Literal["gpt2"] = "gpt2"
    vocab_size: int
    """Number of token ids; must not be below the tokenizer's."""
    context_length: int
    """Number of learned positions; the longest sequence."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Number of blocks."""
    num_heads: int
    """Attention heads; must divide the hidden size."""
    ffn_size: int
    """Width of the feed-forward layer (4 x hidden in every published size)."""
    dropout: float = 0.1
    """Dropout after embedding, attention output and feed-forward output."""
    attention_dropout: float = 0.1
    """Dropout of attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of every weight matrix at start."""
    residual_init_scaling: bool = True
    """Divide the deviation of both residual projections by sqrt(2 x layers), as GPT-2 does."""
    activation_checkpointing: bool = False
    """Recompute the blocks in the backward pass instead of keeping their activations."""
    sites: GPT2Sites = GPT2Sites()
    """Representation of each family of weight matrices."""
    moe: MoEConfig | None = None
    """Mixtures of experts in place of feed-forward layers; absent = none."""

    @property
    def longest_sequence(self) -> int:
        """Number of learned positions."""
        return self.context_length

    def site_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape (in, out) of each family of matrices."""
        hidden, ffn = self.hidden_size, self.ffn_size
        return {
            "embedding": (self.vocab_size, hidden),
            "qkv": (hidden, 3 * hidden),
            "attention_out": (hidden, hidden),
            "c_fc": (hidden, ffn),
            "c_proj": (ffn, hidden),
        }

    def mixture_layers(self) -> list[int]:
        """Return the numbers (from 0) of the blocks whose feed-forward layer is a mixture."""
        return [] if self.moe is None else self.moe.layers(self.num_layers)

    def mixtures(self) -> list[str]:
        """Return the logical names of the mixtures, in the order of their statistics."""
        return [f"blocks.{layer}.ffn" for layer in self.mixture_layers()]

    def site_std(self, family: str) -> float:
        """Return the standard deviation at start of the matrices of a family.

        The residual scaling of GPT-2 is for dense projections and for those of experts, whatever
        they are made of; TTM GPT-2 applies none to its cores, so another tensorized projection
        starts with `init_std`.

        Args:
            family: a family of `all_sites`.
        """
        residual = family == "expert_c_proj" or (
            family in ("attention_out", "c_proj") and getattr(self.sites, family).kind == "dense"
        )
        if residual and self.residual_init_scaling:
            return self.init_std / float((2 * self.num_layers) ** 0.5)
        return self.init_std

    def sites_of_family(self, family: str) -> list[str]:
        """Return the logical module names of all matrices of a family."""
        if family == "embedding":
            return ["token_embedding"]
        mixtures = set(self.mixture_layers())
        layers = [
            layer
            for layer in range(self.num_layers)
            if family not in FEED_FORWARD or layer not in mixtures
        ]
        owner = "attention" if family in ("qkv", "attention_out") else "ffn"
        leaf = "out" if family == "attention_out" else family
        return [f"blocks.{layer}.{owner}.{leaf}" for layer in layers]

    def all_sites(self) -> list[Site]:
        """Return every weight matrix, in the order of the forward pass within a family.

        Raises:
            SpecError: a representation does not fit its matrix; `problems` says so in advance.
        """
        result = []
        for family, (in_features, out_features) in self.site_shapes().items():
            choice = getattr(self.sites, family)
            spec = choice.spec(in_features, out_features)
            bias = choice.bias and family != "embedding"
            for name in self.sites_of_family(family):
                result.append(Site(name, family, in_features, out_features, choice, spec, bias))
        return result if self.moe is None else result + self._mixture_sites(self.moe)

    def _mixture_sites(self, moe: MoEConfig) -> list[Site]:
        bias = moe.router.bias
        result = [
            Site(
                f"{mixture}.router", "router", self.hidden_size, moe.num_experts,
                DenseSite(bias=bias), None, bias,
            )
            for mixture in self.mixtures()
        ]  # fmt: skip
        for leaf in FEED_FORWARD:
            shape, choice = self.site_shapes()[leaf], getattr(moe, leaf)
            spec = choice.spec(*shape)
            for mixture in self.mixtures():
                result.append(
                    Site(
                        f"{mixture}.{leaf}", f"expert_{leaf}", *shape, choice, spec, choice.bias,
                        moe.num_experts, moe.router.top_k,
                    )
                )  # fmt: skip
        return result

    def parameters(self) -> Iterator[ParameterInfo]:
        """Yield every parameter of the model, without building it."""
        hidden = self.hidden_size
        shape = (self.context_length, hidden)
        yield ParameterInfo("position_embedding", shape, "dense", None, part="positions")
        for site in self.all_sites():
            yield from site_parameters(site)
        norms = [f"blocks.{n}.norm_{k}" for n in range(self.num_layers) for k in (1, 2)]
        for norm in [*norms, "final_norm"]:
            yield ParameterInfo(f"{norm}.weight", (hidden,), "dense", None)
            yield ParameterInfo(f"{norm}.bias", (hidden,), "dense", None)

    def attention_flops(self, lengths: SampleLengths) -> int:
        """Return FLOPs of causal scores and weighted values of a sample, forward and backward."""
        return 6 * self.num_layers * self.hidden_size * lengths.inputs**2

    def problems(self, where: str) -> list[str]:
        """Return everything that makes this model impossible, one line each.

        Args:
            where: dotted key of this section, at the head of every line.
        """
        found = size_problems(self, where, SIZE_KEYS, ("dropout", "attention_dropout"))
        found += positive_problems(self, where, ("init_std",))
        if found:
            return found
        return collect_problems(
            lambda: head_problems(self.hidden_size, self.num_heads, where),
            lambda: self._mixture_problems(f"{where}.moe"),
            *(partial(self._useless_problems, where, family) for family in FEED_FORWARD),
            *(partial(self._site_problems, where, family) for family in SITE_NAMES),
        )

    def _mixture_problems(self, where: str) -> list[str]:
        if self.moe is None:
            return []
        return self.moe.problems(
            where,
            known_size(lambda: self.hidden_size),
            known_size(lambda: self.ffn_size),
            known_size(lambda: self.num_layers),
        )
