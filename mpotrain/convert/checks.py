"""Everything that speaks against taking a trained model over into a run, at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.config import RunConfig
from mpotrain.convert.source import Source
from mpotrain.models.config import FEED_FORWARD, SITE_NAMES, SIZE_KEYS, GPT2Config
from mpotrain.nn.moe.config import MoEConfig
from mpotrain.pretrain import CHECKPOINTS
from mpotrain.train.journal import JOURNAL_FILE
from mpotrain.trained import SINGLE

Target = Literal["gpt2", "mpo-moe"]
"""What a model is converted to: the same network, or one with mixtures of experts."""


def conversion_problems(source: Source, run: RunConfig, target: Target) -> list[str]:
    """Return everything that makes the conversion impossible, one line each with dotted keys.

    Args:
        source: the trained model.
        run: the run that takes it over.
        target: what it is converted to.
    """
    config = run.model
    found = [*_folder_problems(Path(run.folder)), *_size_problems(source.config, config)]
    if source.config.moe is not None:
        found.append(
            f"SOURCE: {source.origin} has mixtures of experts; only dense models can be taken"
        )
    if target == "gpt2" and config.moe is not None:
        found.append("model.moe: --to gpt2 keeps the network; leave it out, or use --to mpo-moe")
    if target == "mpo-moe" and config.moe is None:
        found.append("model.moe: is absent; describe the mixtures, or use --to gpt2")
    found += _site_problems(source, config)
    if config.moe is not None:
        found += _bias_problems(source.config, config.moe)
        found += _router_problems(config.moe)
    return found


def _folder_problems(folder: Path) -> Iterator[str]:
    steps = CheckpointStore(folder / CHECKPOINTS, CheckpointConfig(), SINGLE).steps()
    if steps:
        yield (
            f"folder: {folder} has a checkpoint of step {steps[0]}; a run begins only once: choose "
            "another folder (folder=...), or move it away"
        )
    elif (folder / JOURNAL_FILE).exists():
        yield (
            f"folder: {folder} holds a run that has begun ({JOURNAL_FILE}); choose another folder "
            "(folder=...), or move it away"
        )


def _size_problems(source: GPT2Config, target: GPT2Config) -> Iterator[str]:
    for key in SIZE_KEYS:
        theirs, ours = getattr(source, key), getattr(target, key)
        if theirs == ours:
            continue
        hint = ""
        if key == "vocab_size" and ours > theirs:
            hint = "; the scores of new rows would take probability from all others"
        yield f"model.{key}: is {ours}, the source has {theirs}; set model.{key}={theirs}{hint}"


def _site_problems(source: Source, target: GPT2Config) -> Iterator[str]:
    """Compare the representation of every family of matrices that is copied."""
    for family in SITE_NAMES:
        theirs, ours = (getattr(config.sites, family) for config in (source.config, target))
        if family in FEED_FORWARD and target.moe is not None and theirs.kind != "dense":
            yield (
                f"SOURCE: its model.sites.{family} is {theirs.kind}; experts are made of dense "
                "matrices"
            )
        if not target.sites_of_family(family):
            continue
        shape = target.site_shapes()[family]
        if family != "embedding" and theirs.bias != ours.bias:
            yield f"model.sites.{family}.bias: is {ours.bias}, the source has {theirs.bias}"
        same_shape = source.config.site_shapes()[family] == shape
        if same_shape and theirs.spec(*shape) != ours.spec(*shape):
            yield (
                f"model.sites.{family}: the source has another representation "
                f"({_shown(theirs)}), only equal ones are copied"
            )


def _bias_problems(source: GPT2Config, moe: MoEConfig) -> Iterator[str]:
    for family in FEED_FORWARD:
        theirs, ours = getattr(source.sites, family).bias, getattr(moe, family).bias
        if theirs != ours:
            yield f"model.moe.{family}.bias: is {ours}, the source has {theirs}"


def _router_problems(moe: MoEConfig) -> Iterator[str]:
    """Yield why a token would not get exactly what equal experts compute.

    Copies of one expert give the same output y, so the mixture gives y times the sum of the gates
    of the experts that keep the token; that sum must be 1.
    """
    router, experts, where = moe.router, moe.num_experts, "model.moe.router"
    if router.top_k == 1 and router.gate == "probability" and experts > 1:
        yield (
            f'{where}.gate: "probability" multiplies every expert by a probability below 1, so the '
            'first loss would not be that of the source; use "straight_through", or top_k=2'
        )
    if 1 < router.top_k < experts and not router.normalise:
        yield (
            f"{where}.normalise: is false, so the gates of {router.top_k} experts sum to less than "
            "1 and the first loss would not be that of the source; set it to true"
        )
    factor = router.eval_capacity_factor
    # An expert that everybody chooses takes N tokens; its capacity is ceil(factor k N / E).
    if factor is not None and factor * router.top_k < experts:
        yield (
            f"{where}.eval_capacity_factor: is {factor}, which can drop tokens, so the first loss "
            f"would not be that of the source; leave it out, or set {experts / router.top_k:g} "
            "or more"
        )


def _shown(site: object) -> str:
    fields = {key: value for key, value in vars(site).items() if value is not None}
    kept = ("kind", "rank", "in_modes", "out_modes", "bonds", "cap", "layout")
    return ", ".join(f"{key}={fields[key]}" for key in kept if key in fields)
