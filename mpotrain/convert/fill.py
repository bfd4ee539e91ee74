"""The weights of a trained model laid into another network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mpotrain.convert.depth import DepthMap
from mpotrain.convert.fill_encoder import EncoderFill
from mpotrain.convert.matrices import Matrices, SiteError
from mpotrain.convert.source import Source
from mpotrain.convert.upcycle import expert_values
from mpotrain.errors import CheckpointError
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.network import ROUTER
from mpotrain.models.sites import Site

NEW = (".ffn.router.", "adapters.", "mlm_head.", "pooler.", "pair_head.")
"""Parts of the names of what is drawn where the source has nothing of the kind."""


@dataclass(frozen=True)
class Filled:
    """All weights of a network, made of those of another.

    Attributes:
        weights: by logical name, complete.
        errors: what each decomposed matrix has lost.
        notes: what is not as in the source, for people.
        is_exact: whether the network is meant to compute what the source does.
    """

    weights: dict[str, Tensor]
    errors: list[SiteError]
    notes: list[str]
    is_exact: bool = True


def fill(config: AnyModel, source: Source, drawn: Mapping[str, Tensor]) -> Filled:
    """Make all weights of a network of those of a trained one.

    Args:
        config: of the new network; nothing speaks against it (`conversion_problems`).
        source: the trained model, of the same kind.
        drawn: start values of the new network, for what the source has not.

    Returns:
        The weights; tensors may be views of those of the source.

    Raises:
        CheckpointError: the source lacks a tensor.
    """
    if isinstance(config, EncoderConfig):
        filled = _encoder(config, source, drawn)
    else:
        filled = _plain(config.all_sites(), source)
    wanted = [info.name for info in config.parameters()]
    new = []
    for name in [name for name in wanted if name not in filled.weights]:
        if name in source.weights and not name.startswith("adapters."):
            filled.weights[name] = source.weights[name]
        elif name in drawn and any(part in name for part in NEW):
            filled.weights[name] = drawn[name]
            new.append(name)
    if lacking := [name for name in wanted if name not in filled.weights]:
        raise CheckpointError(f"the source has no {', '.join(lacking)}")
    return Filled(filled.weights, filled.errors, filled.notes + _new(new), filled.is_exact)


def _plain(sites: list[Site], source: Source) -> Filled:
    """Fill the matrices of a network whose layers share nothing."""
    matrices = Matrices(source.config, source.weights)
    weights: dict[str, Tensor] = {}
    errors: list[SiteError] = []
    for site in sites:
        if site.family == ROUTER or site.name not in matrices.sites:
            continue
        if f"{site.name}.weight" in source.fresh:
            continue
        if site.num_experts:
            values, error = expert_values(site, matrices)
        else:
            values, error = matrices.values(site)
            if site.bias:
                values[f"{site.name}.bias"] = matrices.bias(site)
        weights |= values
        errors += [] if error is None else [error]
    return Filled(weights, errors, [])


def _encoder(config: EncoderConfig, source: Source, drawn: Mapping[str, Tensor]) -> Filled:
    old = source.config
    assert isinstance(old, EncoderConfig)
    layers = EncoderFill(config, old, source.weights, drawn)
    outside = [site for site in config.all_sites() if not site.name.startswith("blocks.")]
    filled = _plain(outside, source)
    filled.weights.update(layers.values)
    depth = DepthMap(old, config)
    notes = []
    if depth.deepens:
        notes.append(f"{config.num_layers} layers made of {old.num_layers}")
    if depth.is_scaled:
        start = config.start
        notes.append(
            f"auxiliary tensors of layers from {start.unscaled_layers} on scaled "
            f"{start.auxiliary_scale} for {config.num_layers} layers"
        )
    if depth.draws:
        notes.append(
            f"auxiliary tensors of layers from {config.start.unscaled_layers} on drawn anew"
        )
    if depth.folds:
        notes.append("adapters of the source added to its matrices")
    if old.pair_head and not config.pair_head:
        notes.append("pooler and pair_head of the source left out")
    exact = not (depth.deepens or depth.is_scaled or depth.draws)
    return Filled(filled.weights, filled.errors + layers.errors, notes, exact)


def _new(names: list[str]) -> list[str]:
    """Return a line that names the parts of a network that begin untrained."""
    parts = {
        "adapters" if name.startswith("adapters.") else name.partition(".")[0]
        for name in names
        if ".ffn.router." not in name
    }
    parts |= {"routers" for name in names if ".ffn.router." in name}
    return [f"not in the source, drawn anew: {', '.join(sorted(parts))}"] if parts else []
