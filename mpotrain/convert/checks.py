"""Everything that speaks against taking a trained model over into a run, at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.config import RunConfig
from mpotrain.convert.encoder_checks import encoder_problems
from mpotrain.convert.source import Source
from mpotrain.models import encoder_config, gpt2_config, t5_config
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.t5_config import T5Config
from mpotrain.nn.moe.config import MoEConfig
from mpotrain.run_record import CHECKPOINTS
from mpotrain.train.journal import JOURNAL_FILE
from mpotrain.trained import SINGLE

Target = Literal["gpt2", "encoder", "t5", "mpo-moe"]
"""What a model is converted to: a network of its own kind, or one with mixtures of experts."""
SIZE_KEYS = {
    "gpt2": gpt2_config.SIZE_KEYS,
    "encoder": encoder_config.SIZE_KEYS,
    "t5": t5_config.SIZE_KEYS,
}
SETTINGS = {
    "gpt2": (),
    "encoder": ("embedding_size", "norm", "norm_eps", "activation"),
    "t5": ("norm_eps",),
}
"""Keys beside the sizes that decide what a network computes."""


def conversion_problems(source: Source, run: RunConfig, target: Target) -> list[str]:
    """Return everything that makes the conversion impossible, one line each with dotted keys.

    Args:
        source: the trained model.
        run: the run that takes it over.
        target: what it is converted to.
    """
    config = run.model
    found = [*_folder_problems(Path(run.folder)), *_kind_problems(source, config, target)]
    if source.config.kind != config.kind:
        return found
    found += _size_problems(source.config, config)
    if source.config.moe is not None:
        found.append(
            f"SOURCE: {source.origin} has mixtures of experts; only dense models can be taken"
        )
    found += _bias_problems(source.config, config)
    if isinstance(config, EncoderConfig) and isinstance(source.config, EncoderConfig):
        found += encoder_problems(source.config, config)
    if config.moe is not None:
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


def _kind_problems(source: Source, config: AnyModel, target: Target) -> Iterator[str]:
    if target != "mpo-moe" and config.kind != target:
        yield f"model.kind: is {config.kind}, but --to {target} was asked for"
    if source.config.kind != config.kind:
        yield (
            f"SOURCE: {source.origin} is of the kind {source.config.kind}; it cannot become one of "
            f"model.kind={config.kind}"
        )
    if target == "mpo-moe" and isinstance(config, EncoderConfig):
        yield "model.kind: is encoder, which has no mixtures of experts; use gpt2 or t5"
    elif target == "mpo-moe" and config.moe is None:
        yield f"model.moe: is absent; describe the mixtures, or use --to {config.kind}"
    if target != "mpo-moe" and config.moe is not None:
        yield f"model.moe: --to {target} makes no experts; leave it out, or use --to mpo-moe"


def _size_problems(source: AnyModel, target: AnyModel) -> Iterator[str]:
    for key in (*SIZE_KEYS[target.kind], *SETTINGS[target.kind]):
        theirs, ours = getattr(source, key), getattr(target, key)
        if theirs == ours or (key == "num_layers" and _may_deepen(source, theirs, ours)):
            continue
        hint = ""
        if key == "vocab_size" and ours > theirs:
            hint = "; the scores of new rows would take probability from all others"
        advice = f"set model.{key}={theirs}" if theirs is not None else f"leave model.{key} out"
        yield f"model.{key}: is {ours}, the source has {theirs}; {advice}{hint}"
    if isinstance(source, T5Config) and isinstance(target, T5Config):
        theirs, ours = source.stacks["decoder"], target.stacks["decoder"]
        if theirs != ours:
            yield (
                f"model.num_decoder_layers: is {ours}, the source has {theirs}; set "
                f"model.num_decoder_layers={theirs}"
            )


def _may_deepen(source: AnyModel, theirs: int, ours: int) -> bool:
    """Whether layers can be added: they are all alike, so that one more is made of any."""
    shares = isinstance(source, EncoderConfig) and source.sharing.scope == "all"
    return shares and ours > theirs


def _bias_problems(source: AnyModel, target: AnyModel) -> Iterator[str]:
    """Compare the biases of every family of matrices, those of experts with their origin's."""
    theirs = {site.name: site for site in source.all_sites()}
    told = set()
    for site in target.all_sites():
        other = theirs.get(site.name)
        if other is None or site.key in told or isinstance(target, EncoderConfig):
            continue
        if other.bias != site.bias:
            told.add(site.key)
            yield f"model.{site.key}.bias: is {site.bias}, the source has {other.bias}"


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
