"""What layers of a deep network share, and what each owns (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from mpotrain.schema import collect_problems, config

BLOCK_FAMILIES = ("query", "key", "value", "attention_out", "c_fc", "c_proj")
"""The six matrices of a block, one family each (Liu et al. 2023, section 3.1)."""
ATTENTION_FAMILIES = BLOCK_FAMILIES[:4]


@config
class SharingConfig:
    """Sharing over depth (MPOBERT, Liu et al. 2023; ALBERT, Lan et al. 2020)."""

    scope: Literal["none", "central", "all"] = "none"
    """What the layers of a group share: nothing, the central tensor of every tensorized family
    (auxiliary tensors are each layer's own), or whole blocks as in ALBERT."""
    groups: int = 1
    """Groups of consecutive layers, each with its own shared tensors; must divide the layers."""
    vectors: Literal["own", "tied"] = "own"
    """Biases and norms: each layer's own, or one set for each group (scope `central`)."""
    start: Literal["copies", "independent"] = "copies"
    """Auxiliary tensors at start (scope `central`): one draw for all layers of a group, as after
    decomposing a shared model, or a draw for each layer."""

    def problems(self, where: str, num_layers: int) -> list[str]:
        """Return everything that makes the sharing impossible, one line each.

        Args:
            where: dotted key of this section.
            num_layers: layers of the network; below 1 what needs them is not checked.
        """

        def groups() -> Iterator[str]:
            if self.groups < 1:
                yield f"{where}.groups: must be at least 1, is {self.groups}"
            elif num_layers >= 1 and num_layers % self.groups:
                divisors = [str(g) for g in range(1, num_layers + 1) if num_layers % g == 0]
                yield (
                    f"{where}.groups: {self.groups} groups do not divide {num_layers} layers; "
                    f"possible: {', '.join(divisors)}"
                )

        def nothing_shared() -> Iterator[str]:
            if self.scope == "none" and self.groups > 1:
                yield f"{where}.groups: {self.groups}, but nothing is shared ({where}.scope)"

        def vectors() -> Iterator[str]:
            if self.vectors == "tied" and self.scope != "central":
                yield (
                    f'{where}.vectors: "tied" belongs to {where}.scope="central"; scope "all" '
                    "shares them anyway, scope none shares nothing"
                )

        def start() -> Iterator[str]:
            if self.start == "independent" and self.scope != "central":
                yield f'{where}.start: has an effect in {where}.scope="central" only'

        return collect_problems(groups, nothing_shared, vectors, start)


@config
class AdapterConfig:
    """Low-rank additions U D of each layer's own to its matrices (Hu et al. 2022; MPOBERT 3.1)."""

    rank: int = 8
    """Rank r: U is (in, r) and starts at zero, D is (r, out) and starts Gaussian."""
    families: tuple[Literal["query", "key", "value", "attention_out", "c_fc", "c_proj"], ...] = (
        "query",
        "key",
        "value",
        "attention_out",
    )
    """Matrices that get one; the published sizes fit the four of attention."""
    std: float = 0.02
    """Standard deviation of D at start."""

    def problems(self, where: str, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Return everything that makes the adapters impossible or pointless, one line each.

        Args:
            where: dotted key of this section.
            shapes: sizes (in, out) of matrices by family; those of others are not checked.
        """

        def rank() -> Iterator[str]:
            if self.rank < 1:
                yield f"{where}.rank: must be at least 1, is {self.rank}"

        def low_rank() -> Iterator[str]:
            highest = {f: min(shapes[f]) for f in dict.fromkeys(self.families) if f in shapes}
            whole = [family for family, rank in highest.items() if self.rank >= rank]
            if whole:
                yield (
                    f"{where}.rank: {self.rank} is not below the smaller side of "
                    f"{', '.join(whole)}, so nothing is low-rank there; take less than "
                    f"{min(highest.values())}"
                )

        def std() -> Iterator[str]:
            if self.std <= 0:
                yield f"{where}.std: must be positive, is {self.std}"

        def families() -> Iterator[str]:
            if not self.families:
                yield f"{where}.families: is empty; leave the section out for no adapters"
            elif len(set(self.families)) < len(self.families):
                yield f"{where}.families: a family is named twice"

        return collect_problems(rank, low_rank, std, families)


@config
class StartConfig:
    """Start values of deep networks (stable initialisation)."""

    auxiliary_scale: Literal["none", "per_side", "per_tensor"] = "none"
    """Scaling of the auxiliary tensors with the depth L (Liu et al. 2023): `per_side` makes the
    product of those left of the central tensor, and of those right of it, (2L)^(-1/4) times
    smaller, which is what their corollary A.2 asks; `per_tensor` scales each one by (2L)^(-1/4), as
    their algorithm 2 is written (W becomes (2L)^(-1) times smaller with two on each side)."""
    unscaled_layers: int = 0
    """First layers that keep their size: the depth of the shared model that a deeper one is made
    of (24 in the paper); 0 from scratch."""
    deeper: Literal["copies", "drawn"] = "copies"
    """Auxiliary tensors of the layers from `unscaled_layers` on where a fully shared model is
    converted: those of the model, scaled (algorithm 2 of the paper), or the layers' own start
    values, scaled (its main text, with `init = "xavier"` of the sites)."""
    deepnorm: bool = False
    """DeepNorm (Wang et al. 2022, arXiv 2203.00555) for post-norm: the residual is multiplied by
    (2L)^(1/4), value, output and feed-forward matrices start (8L)^(-1/4) times smaller."""

    def problems(self, where: str, num_layers: int) -> list[str]:
        """Return everything impossible or without effect, one line each.

        Args:
            where: dotted key of this section.
            num_layers: layers of the network; below 1 what needs them is not checked.
        """

        def layers() -> Iterator[str]:
            unscaled = self.unscaled_layers
            if unscaled < 0:
                yield f"{where}.unscaled_layers: must be at least 0, is {unscaled}"
            elif 1 <= num_layers < unscaled:
                yield f"{where}.unscaled_layers: must be in 0..{num_layers}, is {unscaled}"

        def useless() -> Iterator[str]:
            unscaled = self.unscaled_layers
            if unscaled > 0 and self.auxiliary_scale == "none" and self.deeper == "copies":
                yield (
                    f"{where}.unscaled_layers: {unscaled}, but no layer is scaled or drawn; set "
                    f'{where}.auxiliary_scale (or {where}.deeper="drawn"), or leave it at 0'
                )

        def drawn() -> Iterator[str]:
            if self.deeper == "drawn" and self.unscaled_layers == 0:
                yield (
                    f'{where}.deeper: "drawn" with {where}.unscaled_layers 0 would take no '
                    "auxiliary tensor from the shared model; say how many layers begin as it is"
                )

        return collect_problems(layers, useless, drawn)
