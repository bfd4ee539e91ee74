"""A trained model as something to begin with, whatever it was read from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpotrain.checkpoint.compare import parameter_differences
from mpotrain.checkpoint.manifest import Signature
from mpotrain.config import RunConfig
from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.special_ids import CausalTokens, MaskedTokens, SpanTokens
from mpotrain.errors import CheckpointError, DataError
from mpotrain.models.config import AnyModel
from mpotrain.nn.roles import Role
from mpotrain.parallel.plan import DEGREES
from mpotrain.trained import load_trained, saved_tokenizer

PLAIN = (
    'engine={kind="local", dtype="fp32", device="cpu"}',
    "parallel.sequence=false",
    *(f"parallel.{degree}=1" for degree in DEGREES),
)
"""Overrides under which any run's model computes in fp32 in one process."""
SHOWN = 8
"""Number of names that a message lists before it counts the rest."""

SpecialIds = CausalTokens | MaskedTokens | SpanTokens


@dataclass(frozen=True)
class Source:
    """A trained model: sizes, weights and what is known of its tokenizer.

    Attributes:
        origin: where it comes from, for people.
        config: sizes and representation of every site.
        weights: fp32 CPU tensors by logical name, complete for `config` but for `fresh`.
        fresh: names of the heads that were not trained, or not kept; they are drawn anew.
        tokenizer_digest: digest of the tokenizer of its data; None where it is not recorded.
        tokenizer_files: files of the model that hold its vocabulary, the most telling first.
        special: ids with a meaning of their own; None where they are not recorded.
    """

    origin: str
    config: AnyModel
    weights: Mapping[str, Tensor]
    fresh: tuple[str, ...] = ()
    tokenizer_digest: str | None = None
    tokenizer_files: tuple[Path, ...] = ()
    special: SpecialIds | None = None


def run_source(folder: Path, step: int | None) -> Source:
    """Read the model of a run folder.

    Args:
        folder: run folder, or one of its checkpoints.
        step: step of the checkpoint; None for the newest.

    Raises:
        CheckpointError: there is no sound checkpoint.
    """
    trained = load_trained(folder, step, PLAIN)
    weights = {name: tensor.detach() for name, tensor in trained.model.named_parameters()}
    tokenizer = saved_tokenizer(trained.manifest)
    file = None if tokenizer.file is None else trained.folder / tokenizer.file
    return Source(
        origin=f"{trained.folder}, step {trained.manifest.step:,}",
        config=trained.run.model,
        weights=weights,
        tokenizer_digest=tokenizer.digest,
        tokenizer_files=(file,) if file is not None and file.is_file() else (),
        special=_special_ids(trained.run, tokenizer),
    )


def _special_ids(run: RunConfig, tokenizer: TokenizerEntry) -> SpecialIds | None:
    try:
        return run.data.objective.special(tokenizer)
    except DataError:  # a run that was never trained may not go with its data
        return None


def require_weights(
    config: AnyModel, weights: Mapping[str, Tensor], origin: str, fresh: Collection[str] = ()
) -> None:
    """Make sure that weights are complete, of the right shapes and finite.

    Args:
        config: a dense model.
        weights: tensors by logical name.
        origin: where they come from, at the head of the message.
        fresh: names that may be absent.

    Raises:
        CheckpointError: with the first differences.
    """
    found: dict[str, Signature] = {
        name: (str(Role.DENSE), tuple(tensor.shape)) for name, tensor in weights.items()
    }
    wanted: dict[str, Signature] = {
        info.name: (info.role, info.shape) for info in config.parameters() if info.name not in fresh
    }
    lines = parameter_differences(found, wanted)
    lines += [
        f"{name}: holds NaN or infinity"
        for name, tensor in weights.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    if lines:
        raise CheckpointError(f"{origin}: no whole {config.kind}:\n{listing(lines)}")


def listing(lines: list[str]) -> str:
    """Return indented lines, a long list cut short."""
    shown = [f"  {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  ... and {len(lines) - SHOWN} more")
    return "\n".join(shown)
