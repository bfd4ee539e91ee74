"""What speaks against making one encoder of another: settings, and what layers share."""

from __future__ import annotations

from collections.abc import Iterator

from mpotrain.convert.depth import DepthMap
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.nn.sharing_config import BLOCK_FAMILIES


def encoder_problems(source: EncoderConfig, target: EncoderConfig) -> list[str]:
    """Return everything about layers that makes the conversion impossible, one line each.

    Args:
        source: the trained encoder.
        target: the one that is made of it.
    """
    found = [
        f"model.sites.{family}.bias: is {ours}, the source has {theirs}"
        for family in BLOCK_FAMILIES
        if (ours := getattr(target.sites, family).bias)
        != (theirs := getattr(source.sites, family).bias)
    ]
    if source.start.deepnorm != target.start.deepnorm:
        found.append(
            f"model.start.deepnorm: is {_toml(target.start.deepnorm)}, the source has "
            f"{_toml(source.start.deepnorm)}; it is a factor on every residual"
        )
    depth = DepthMap(source, target)
    if depth.deepens and source.adapter is not None:
        found.append(
            f"model.num_layers: is {target.num_layers}, the source has {source.num_layers} layers "
            f"with adapters of their own; set model.num_layers={source.num_layers}"
        )
    elif not depth.deepens or source.sharing.scope == "all":
        found += [*_matrix_problems(depth), *_vector_problems(depth)]
    return found


def _matrix_problems(depth: DepthMap) -> Iterator[str]:
    target = depth.target
    where = f'model.sharing.scope: is "{target.sharing.scope}"'
    for family in BLOCK_FAMILIES:
        if family not in target.banked_families():
            if any(len(origins) > 1 for origins in depth.block_origins(family).values()):
                yield f"{where}, but layers of the source have {family} matrices of their own"
        elif depth.keeps_bank(family):
            if any(len(names) > 1 for names in depth.banks(family).values()):
                yield (
                    f"model.sharing.groups: is {target.sharing.groups}, but the source has "
                    f"{depth.source.sharing.groups}, whose central tensors of {family} differ"
                )
        elif any(len(origins) > 1 for origins in depth.group_origins(family).values()):
            yield (
                f"{where}, but layers of the source have {family} matrices of their own"
                f"{_why_own(depth, family)}; no central tensor is common to them"
            )


def _why_own(depth: DepthMap, family: str) -> str:
    source = depth.source
    if family in source.banked_families():
        adapted = depth.folds and source.adapter is not None and family in source.adapter.families
        return " (adapters that model.adapter has not)" if adapted else " (of other core shapes)"
    return ""


def _vector_problems(depth: DepthMap) -> Iterator[str]:
    differing = [name for name, theirs in depth.vectors().items() if len(theirs) > 1]
    if differing and depth.target.ties_vectors():
        yield (
            'model.sharing.vectors: is "tied", but layers of the source have biases and norms of '
            'their own; set it to "own"'
        )
    elif differing:
        yield (
            f'model.sharing.scope: is "{depth.target.sharing.scope}", but layers of the source '
            "have biases and norms of their own"
        )


def _toml(value: bool) -> str:
    return str(value).lower()
