"""A trained GPT-2 as something to begin with, whatever it was read from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from mpotrain.assemble import build_model
from mpotrain.checkpoint.compare import parameter_differences
from mpotrain.checkpoint.manifest import Signature
from mpotrain.data.dataset import BlendedDataset
from mpotrain.errors import CheckpointError
from mpotrain.models.config import GPT2Config
from mpotrain.nn.roles import Role
from mpotrain.trained import load_trained, saved_tokenizer

PLAIN = ('engine={kind="local", dtype="fp32", device="cpu"}', "parallel.expert=1")
"""Overrides under which any run's model computes in fp32 in one process."""
SHOWN = 8
"""Number of names that a message lists before it counts the rest."""


@dataclass(frozen=True)
class Source:
    """A trained model: sizes, weights and what is known of its tokenizer.

    Attributes:
        origin: where it comes from, for people.
        config: sizes and representation of every site.
        weights: fp32 CPU tensors by logical name, complete for `config`.
        tokenizer_digest: digest of the tokenizer of its data; None where it is not recorded.
        tokenizer_file: `tokenizer.json` or `vocab.json` of the model; None where there is none.
    """

    origin: str
    config: GPT2Config
    weights: Mapping[str, Tensor]
    tokenizer_digest: str | None = None
    tokenizer_file: Path | None = None

    def matrix(self, name: str) -> Tensor:
        """Return W (in_features, out_features) of a dense linear layer, y = x W."""
        return self.weights[f"{name}.weight"].t()

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the scores (B, T, V) that the model gives tokens (B, T), computed in fp32."""
        model = build_model(self.config, seed=0, dtype="fp32").eval()
        model.load_state_dict(dict(self.weights))
        with torch.no_grad():
            scores: Tensor = model.logits(model.hidden(tokens))  # type: ignore[operator]
        return scores


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
    return Source(
        origin=f"{trained.folder}, step {trained.manifest.step:,}",
        config=trained.run.model,
        weights=weights,
        tokenizer_digest=saved_tokenizer(trained.manifest).digest,
    )


def require_weights(config: GPT2Config, weights: Mapping[str, Tensor], origin: str) -> None:
    """Make sure that weights are complete, of the right shapes and finite.

    Args:
        config: a dense model.
        weights: tensors by logical name.
        origin: where they come from, at the head of the message.

    Raises:
        CheckpointError: with the first differences.
    """
    found: dict[str, Signature] = {
        name: (str(Role.DENSE), tuple(tensor.shape)) for name, tensor in weights.items()
    }
    wanted: dict[str, Signature] = {
        info.name: (info.role, info.shape) for info in config.parameters()
    }
    lines = parameter_differences(found, wanted)
    lines += [
        f"{name}: holds NaN or infinity"
        for name, tensor in weights.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    if lines:
        raise CheckpointError(f"{origin}: no whole GPT-2:\n{listing(lines)}")


def listing(lines: list[str]) -> str:
    """Return indented lines, a long list cut short."""
    shown = [f"  {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  ... and {len(lines) - SHOWN} more")
    return "\n".join(shown)


def tokenizer_problem(source: Source, dataset: BlendedDataset) -> str | None:
    """Say why data do not go with a model, None where they do or nothing is known.

    Args:
        source: the trained model.
        dataset: data of the run that takes it over.
    """
    entry, theirs = dataset.tokenizer, dataset.tokenizer_path
    if source.tokenizer_digest is not None:
        if entry.digest == source.tokenizer_digest:
            return None
        return (
            f"data.sources: their tokenizer ({entry.kind}, {entry.vocab_size:,} pieces) is not the "
            f"one of {source.origin}; its weights know other tokens. Prepare the data with that "
            "tokenizer (`mpotrain prepare --tokenizer`, the file lies in the source's run folder)"
        )
    if source.tokenizer_file is None or theirs is None:
        return None
    if entry.kind == "huggingface" and vocabulary(theirs) == vocabulary(source.tokenizer_file):
        return None
    return (
        f"data.sources: their tokenizer {theirs} has another vocabulary than "
        f"{source.tokenizer_file}; prepare the data with `mpotrain prepare --tokenizer "
        f"{source.tokenizer_file.with_name('tokenizer.json')}`"
    )


def vocabulary(path: Path) -> dict[str, int]:
    """Return the pieces of a `tokenizer.json` or `vocab.json` with their ids.

    Raises:
        CheckpointError: the file is neither.
    """
    try:
        if path.name == "vocab.json":
            return {str(k): int(v) for k, v in json.loads(path.read_text("utf-8")).items()}
        return dict(tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True))
    except Exception as error:  # the library raises bare Exception for a bad file
        raise CheckpointError(f"{path} is no vocabulary: {error}") from error
