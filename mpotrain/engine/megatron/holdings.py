"""What a rank holds of every tensor of a network, foretold without building it (no torch).

Parameters are cut over tensor-parallel, expert-parallel and expert-tensor ranks; stages and chunks
of the pipeline hold different ones, and copies of those that they share. The modules of the engine
cut their parameters themselves (`Placement`); a test holds both accounts against each other.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mpotrain.engine.megatron.copies import chunk_layers, names_of_several
from mpotrain.engine.megatron.feature_cuts import (
    SIDES,
    FeaturePeriods,
    RankPart,
    feature_periods,
    rank_part,
)
from mpotrain.engine.megatron.periods import Side
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.models.sites import ParameterInfo, Site
from mpotrain.models.t5_config import T5Config
from mpotrain.parallel.plan import ParallelConfig

Place = tuple[int, int]
"""Stage and virtual stage of a chunk."""
EMBEDDING = "token_embedding.weight"
"""Matrix of tokens: held where tokens are embedded and where they are predicted."""
BEHIND = ("final_norm", "mlm_head", "pooler", "pair_head")
"""Modules behind all layers."""
LAYER_NORMS = ("norm_1", "norm_2", "norm_cross", "attention_norm", "ffn_norm")
"""Norms of a layer."""


@dataclass(frozen=True)
class Holding:
    """What a rank holds of one tensor.

    Attributes:
        name: logical name.
        size: elements on the rank, padding of a cut vocabulary included.
        is_partial: whether its gradient is summed over tensor-parallel ranks once per step.
        is_expert: whether its gradient is summed over the ranks that hold the same experts.
        summed_inside: whether its gradient is summed over expert-tensor ranks in every backward
            pass.
        num_experts: experts that the whole tensor runs over; 0 = none.
    """

    name: str
    size: int
    is_partial: bool = False
    is_expert: bool = False
    summed_inside: bool = False
    num_experts: int = 0


def held_names(model: AnyModel, parallel: ParallelConfig) -> dict[Place, set[str]]:
    """Return the logical names that each chunk holds, in the order of the pipeline.

    Args:
        model: the network.
        parallel: the degrees; stages and chunks divide the layers.
    """
    everything = {info.name for info in model.parameters()}
    if isinstance(model, T5Config):
        return {(0, 0): everything}
    cut = chunk_layers(model.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    of_layer = {n: layer_names(model, n, everything) for n in range(model.num_layers)}
    found = {
        place: set[str]().union(*(of_layer[n] for n in layers)) for place, layers in cut.items()
    }
    outside = everything - set[str]().union(*of_layer.values())
    behind = {name for name in outside if name.partition(".")[0] in BEHIND}
    order = list(found)
    found[order[0]] |= outside - behind
    found[order[-1]] |= behind | {EMBEDDING}
    return found


def layer_names(model: GPT2Config | EncoderConfig, layer: int, names: Collection[str]) -> set[str]:
    """Return those of the names that a layer uses, tensors that it shares with others included."""
    if isinstance(model, EncoderConfig):
        group = model.group(layer)
        stems = [f"blocks.{model.block(layer)}.", f"adapters.{layer}.", f"tied.{group}."]
        banked = {f"bank.{family}.{group}" for family in model.banked_families()}
    else:
        stems, banked = [f"blocks.{layer}."], set()
    return {name for name in names if name in banked or name.startswith(tuple(stems))}


def copied_names(held: dict[Place, set[str]]) -> frozenset[str]:
    """Return the names of which several chunks hold a copy."""
    return names_of_several(held.values())


class Holder:
    """Tells what a rank holds of the tensors of one network under one layout."""

    def __init__(self, model: AnyModel, parallel: ParallelConfig) -> None:
        """Prepare.

        Args:
            model: the network.
            parallel: the degrees, without problems.
        """
        self._model, self._parallel = model, parallel
        self.periods: FeaturePeriods = feature_periods(
            model, parallel.tensor, parallel.expert_tensor
        )
        self._sites = {site.name: site for site in model.all_sites()}

    def part(self, site: Site) -> RankPart:
        """Return what a rank holds of the matrix of a site."""
        parallel = self._parallel
        return rank_part(site, self.periods, parallel.tensor, parallel.expert_tensor)

    def holdings(self) -> dict[str, Holding]:
        """Return what a rank that holds everything of a stage would hold, by logical name."""
        return {info.name: self._holding(info) for info in self._model.parameters()}

    def _holding(self, info: ParameterInfo) -> Holding:
        site = None if info.site is None else self._sites[info.site]
        if site is None or site.key not in SIDES:
            return self._outside(info)
        if site.num_experts:
            return self._of_experts(info, site)
        part = self.part(site)
        if info.name.endswith(".bias"):
            return self._bias(info, part)
        if site.spec is None:
            return Holding(info.name, info.size // part.parts)
        return self._core(info, site, part)

    def _core(self, info: ParameterInfo, site: Site, part: RankPart) -> Holding:
        is_cut = part.cut is not None and part.cut.core == _core_number(info.name, site)
        size = info.size // part.parts if is_cut else info.size
        return Holding(info.name, size, is_partial=part.parts > 1 and not is_cut)

    def _bias(self, info: ParameterInfo, part: RankPart) -> Holding:
        if part.side == "out":
            return Holding(info.name, info.size // part.parts)
        return Holding(info.name, info.size, is_partial=self._splits_positions)

    def _of_experts(self, info: ParameterInfo, site: Site) -> Holding:
        parallel, part = self._parallel, self.part(site)
        leaf = info.name.rpartition(".")[2]
        if leaf == "bias":
            is_cut = part.side == "out"
        elif site.spec is None:
            is_cut = True
        else:
            is_cut = part.cut is not None and part.cut.core == _core_number(info.name, site)
        size = info.size // (part.parts if is_cut else 1)
        if not info.num_experts:  # the central tensor, which all experts share
            alone = parallel.tensor > 1 and part.parts == 1
            inside = part.parts > 1 and not is_cut
            return Holding(info.name, size, is_partial=alone, summed_inside=inside)
        return Holding(
            info.name,
            size // parallel.expert,
            is_expert=True,
            summed_inside=part.parts > 1 and not is_cut and leaf not in ("bias", "weight"),
            num_experts=info.num_experts,
        )

    def _outside(self, info: ParameterInfo) -> Holding:
        tensor, name = self._parallel.tensor, info.name
        stem, _, leaf = name.rpartition(".")
        if name in (EMBEDDING, "mlm_head.bias"):
            rows, width = info.shape[0], info.size // info.shape[0]
            return Holding(name, -(-rows // tensor) * width)
        if stem.endswith("relative_bias"):
            return Holding(name, info.size // tensor)
        if name.startswith("adapters."):
            cuts_d = _side(stem.rpartition(".")[2]) == "out"
            is_cut = cuts_d == (leaf == "d")
            size = info.size // tensor if is_cut else info.size
            return Holding(name, size, is_partial=tensor > 1 and not is_cut)
        if name.startswith("tied.") and leaf.endswith("_bias") and "norm" not in leaf:
            return self._bias(info, RankPart(tensor, _side(leaf.removesuffix("_bias")), None))
        if stem.endswith(".router"):
            return Holding(name, info.size, is_partial=tensor > 1)
        return Holding(name, info.size, is_partial=self._splits_positions and self._is_norm(name))

    @property
    def _splits_positions(self) -> bool:
        return self._parallel.sequence and self._parallel.tensor > 1

    def _is_norm(self, name: str) -> bool:
        """Return whether a norm works on hidden states of the layers, which positions split."""
        if name.startswith("tied."):
            return "norm" in name
        owner = name.split(".")[-2:-1]
        if owner == ["final_norm"]:
            return not isinstance(self._model, EncoderConfig)
        return bool(owner) and owner[0] in LAYER_NORMS


def _side(family: str) -> Side:
    return SIDES[f"sites.{family}"][1]


def _core_number(name: str, site: Site) -> int:
    """Return which core of its operator a parameter is."""
    assert site.spec is not None
    *_, kind, leaf = name.split(".")
    central = site.spec.central_index
    if kind == "cores":
        return int(leaf)
    if kind == "auxiliaries":
        return int(leaf) + (int(leaf) >= central)
    return central
