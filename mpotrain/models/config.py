"""GPT-2: sizes, sites and parameter counts, known without torch.

`sites()` lists every weight matrix; `parameters()` predicts every parameter with its logical
name, shape and role. Both feed `mpotrain plan` and build the modules; a test holds them equal to
`named_parameters()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from mpotrain.nn.config import DenseSite, SiteConfig, site_problems
from mpotrain.schema import config
from mpotrain.tensor.spec import MPOSpec

SITE_NAMES = ("embedding", "qkv", "attention_out", "c_fc", "c_proj")


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


@dataclass(frozen=True)
class Site:
    """One weight matrix of a model.

    Attributes:
        name: logical name of the module that owns it.
        family: key under `model.sites`.
        in_features: rows I of W (y = x W).
        out_features: columns J of W.
        choice: the representation asked for in the configuration.
        spec: the operator, None when dense.
        bias: whether a bias vector of length J goes with it.
    """

    name: str
    family: str
    in_features: int
    out_features: int
    choice: SiteConfig
    spec: MPOSpec | None
    bias: bool


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter foretold: logical name, shape and role.

    Attributes:
        name: name in `named_parameters()` and in checkpoints.
        shape: global shape.
        role: value of `mpotrain.nn.roles.Role`.
        site: name of the site it belongs to, or None.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    site: str | None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@config
class GPT2Config:
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm, GELU, tied embedding."""

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

    def site_std(self, family: str) -> float:
        """Return the standard deviation at start of the matrices of a family.

        The residual scaling of GPT-2 is for dense projections; TTM GPT-2 applies none to its
        cores, so a tensorized projection starts with `init_std`.
        """
        residual = family in ("attention_out", "c_proj")
        dense = getattr(self.sites, family).kind == "dense"
        if residual and dense and self.residual_init_scaling:
            return self.init_std / float((2 * self.num_layers) ** 0.5)
        return self.init_std

    def sites_of_family(self, family: str) -> list[str]:
        """Return the logical module names of all matrices of a family."""
        if family == "embedding":
            return ["token_embedding"]
        owner = "attention" if family in ("qkv", "attention_out") else "ffn"
        leaf = "out" if family == "attention_out" else family
        return [f"blocks.{layer}.{owner}.{leaf}" for layer in range(self.num_layers)]

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
        return result

    def parameters(self) -> Iterator[ParameterInfo]:
        """Yield every parameter of the model, without building it."""
        hidden = self.hidden_size
        yield ParameterInfo("position_embedding", (self.context_length, hidden), "dense", None)
        for site in self.all_sites():
            yield from _site_parameters(site)
        norms = [f"blocks.{n}.norm_{k}" for n in range(self.num_layers) for k in (1, 2)]
        for norm in [*norms, "final_norm"]:
            yield ParameterInfo(f"{norm}.weight", (hidden,), "dense", None)
            yield ParameterInfo(f"{norm}.bias", (hidden,), "dense", None)

    def num_parameters(self) -> int:
        """Return the number of trainable parameters (tied weights counted once)."""
        return sum(parameter.size for parameter in self.parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """Return dense-equivalent FLOPs of forward and backward for one token.

        6 FLOPs for every weight of the matrices that multiply the token (output layer included,
        embedding look-up not) plus 6 H T x layers for causal attention scores and values.
        This is the model's work whatever the contraction plan; used for MFU.
        """
        matrices = sum(site.in_features * site.out_features for site in self.all_sites())
        return 6 * matrices + 6 * self.num_layers * self.hidden_size * sequence_length

    def problems(self, where: str) -> list[str]:
        """Return everything that makes this model impossible, one line each.

        Args:
            where: dotted key of this section, at the head of every line.
        """
        found = []
        for name in (
            "vocab_size",
            "context_length",
            "hidden_size",
            "num_layers",
            "num_heads",
            "ffn_size",
        ):
            if getattr(self, name) < 1:
                found.append(f"{where}.{name}: must be at least 1, is {getattr(self, name)}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{where}.{name}: must be in [0, 1), is {getattr(self, name)}")
        if self.init_std <= 0:
            found.append(f"{where}.init_std: must be positive, is {self.init_std}")
        if found:
            return found
        if self.hidden_size % self.num_heads:
            found.append(
                f"{where}.num_heads: {self.num_heads} heads do not divide "
                f"hidden_size {self.hidden_size}"
            )
        for family, shape in self.site_shapes().items():
            choice = getattr(self.sites, family)
            found += site_problems(choice, shape, f"{where}.sites.{family}")
        return found


def _site_parameters(site: Site) -> Iterator[ParameterInfo]:
    if site.spec is None:
        # nn.Embedding and nn.Linear both keep (rows of the look-up | outputs) first.
        shape = (site.in_features, site.out_features)
        if site.family != "embedding":
            shape = (site.out_features, site.in_features)
        yield ParameterInfo(f"{site.name}.weight", shape, "dense", site.name)
    else:
        for k, core_shape in enumerate(site.spec.core_shapes):
            role = "central" if k == site.spec.central_index else "auxiliary"
            yield ParameterInfo(f"{site.name}.cores.{k}", core_shape, role, site.name)
    if site.bias:
        yield ParameterInfo(f"{site.name}.bias", (site.out_features,), "dense", site.name)


ModelConfig = GPT2Config
