"""What the configuration of every network can tell without torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal

from mpotrain.models.sites import ParameterInfo, Site
from mpotrain.nn.config import DenseSite, site_problems
from mpotrain.nn.moe.config import MoEConfig
from mpotrain.sample import SampleLengths
from mpotrain.schema import collect_problems

Objective = Literal["causal", "masked", "span_corruption"]
"""What a network learns: the next token, masked tokens, or masked spans."""
ROUTER = "router"
"""Family of the matrices that choose experts."""
FEED_FORWARD = ("c_fc", "c_proj")
"""Families that a mixture of experts replaces in its block."""


class NetworkConfig:
    """Base of all sections `model`: what follows from their sites and parameters.

    Attributes:
        objectives: kinds of `data.objective` that the network can learn.
    """

    objectives: ClassVar[tuple[Objective, ...]]

    @property
    @abstractmethod
    def moe(self) -> MoEConfig | None:
        """Mixtures of experts; None where the network has none."""

    @property
    @abstractmethod
    def sites(self) -> object:
        """Representation of each family of matrices, an attribute for each."""

    @property
    @abstractmethod
    def longest_sequence(self) -> int | None:
        """Most tokens of a sequence that the network reads; None where there is no bound."""

    @abstractmethod
    def site_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape (in, out) of each family that may be tensorized."""

    @abstractmethod
    def all_sites(self) -> list[Site]:
        """Return every weight matrix, in the order of the forward pass within a family.

        Raises:
            SpecError: a representation does not fit its matrix; `problems` says so in advance.
        """

    @abstractmethod
    def parameters(self) -> Iterator[ParameterInfo]:
        """Yield every parameter of the model, without building it."""

    @abstractmethod
    def mixtures(self) -> list[str]:
        """Return the logical names of the mixtures, in the order of their statistics."""

    @abstractmethod
    def attention_flops(self, lengths: SampleLengths) -> int:
        """Return FLOPs of scores and weighted values of a sample, forward and backward."""

    def adapter_flops(self, lengths: SampleLengths) -> int:
        """Return FLOPs of low-rank additions to matrices of a sample, forward and backward.

        None unless a network has adapters; they are no sites.

        Args:
            lengths: rows of a sample.
        """
        return 0

    def buffers(self) -> Iterator[ParameterInfo]:
        """Yield every persistent buffer: state that training changes without a gradient."""
        if self.moe is not None and self.moe.router.balance_rate > 0:
            for mixture in self.mixtures():
                router, shape = f"{mixture}.router", (self.moe.num_experts,)
                yield ParameterInfo(f"{router}.balance", shape, "buffer", router)

    def has_central_tensors(self) -> bool:
        """Return whether any matrix is a matrix product operator."""
        return any(site.spec is not None for site in self.all_sites())

    def num_parameters(self) -> int:
        """Return the number of trainable parameters (tied weights counted once)."""
        return sum(parameter.size for parameter in self.parameters())

    def body_parameters(self) -> int:
        """Return the parameters without routers and without the heads of pretraining.

        Papers count so: MPOE leaves its routers out, ALBERT and MPOBERT their pretraining heads.
        """
        apart = {site.name for site in self.all_sites() if site.family == ROUTER or site.is_head}
        return sum(p.size for p in self.parameters() if not p.is_head and p.site not in apart)

    def active_parameters(self) -> int:
        """Return the parameters that one token meets: of E experts the share of its top_k."""
        if self.moe is None:
            return self.num_parameters()
        experts, top_k = self.moe.num_experts, self.moe.router.top_k
        return sum(
            parameter.size * top_k // experts if parameter.num_experts else parameter.size
            for parameter in self.parameters()
        )

    def flops_per_sample(self, lengths: SampleLengths) -> int:
        """Return dense-equivalent FLOPs of forward and backward for one sample.

        6 FLOPs for every weight of the matrices that multiply a row (output layer included,
        embedding look-up not; of experts those that the token goes to), and those of attention
        and adapters.
        This is the model's work whatever the contraction plan; used for MFU.
        """
        matrices = sum(
            site.in_features * site.out_features * site.top_k * site.calls * lengths.of(site.stream)
            for site in self.all_sites()
        )
        return 6 * matrices + self.attention_flops(lengths) + self.adapter_flops(lengths)

    def flops_per_token(self, lengths: SampleLengths) -> int:
        """Return `flops_per_sample` over the tokens that the network reads of a sample."""
        return self.flops_per_sample(lengths) // lengths.inputs

    def _site_problems(self, where: str, family: str) -> list[str]:
        choice, shape = getattr(self.sites, family), self.site_shapes()[family]
        return site_problems(choice, shape, f"{where}.sites.{family}") if min(shape) >= 1 else []

    def _useless_problems(self, where: str, family: str) -> list[str]:
        choice = getattr(self.sites, family)
        if self.moe is None or self.moe.every != 1 or choice == DenseSite():
            return []
        return [
            f"{where}.sites.{family}: has no effect, every block has a mixture of experts "
            f"instead; leave it out and describe the experts in {where}.moe.{family}"
        ]


def size_problems(
    config: object, where: str, keys: Sequence[str], rates: Sequence[str]
) -> list[str]:
    """Return the sizes below 1 and the dropout rates outside [0, 1), one line each.

    Args:
        config: the section.
        where: its dotted key.
        keys: fields that count something.
        rates: fields that are rates of dropout.
    """

    def size(name: str) -> list[str]:
        value = getattr(config, name)
        return [] if value >= 1 else [f"{where}.{name}: must be at least 1, is {value}"]

    def rate(name: str) -> list[str]:
        value = getattr(config, name)
        return [] if 0 <= value < 1 else [f"{where}.{name}: must be in [0, 1), is {value}"]

    return collect_problems(
        *(partial(size, name) for name in keys), *(partial(rate, name) for name in rates)
    )


def positive_problems(config: object, where: str, keys: Sequence[str]) -> list[str]:
    """Return the numbers that are not above 0, one line each.

    Args:
        config: the section.
        where: its dotted key.
        keys: the fields.
    """

    def check(name: str) -> list[str]:
        value = getattr(config, name)
        return [] if value > 0 else [f"{where}.{name}: must be positive, is {value}"]

    return collect_problems(*(partial(check, name) for name in keys))


def head_problems(hidden_size: int, num_heads: int, where: str) -> list[str]:
    """Return why heads cannot share a width; nothing where one of the numbers is itself wrong.

    Args:
        hidden_size: the width.
        num_heads: the heads.
        where: dotted key of the section.
    """
    if min(hidden_size, num_heads) < 1 or hidden_size % num_heads == 0:
        return []
    return [f"{where}.num_heads: {num_heads} heads do not divide hidden_size {hidden_size}"]
