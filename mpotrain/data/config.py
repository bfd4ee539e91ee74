"""Configuration of training data: what a run reads, and how raw text becomes token shards.

`DataConfig` is a section of a run file. `PrepareConfig` describes one call of `mpotrain prepare`,
which writes the prepared folders that `DataConfig.sources` names. No torch here.
"""

from __future__ import annotations

import math
from functools import partial
from os.path import normpath
from typing import Literal, TypeAlias

from mpotrain.data.objective_config import CausalConfig, ObjectiveConfig
from mpotrain.schema import collect_problems, config, sound_or

MIN_TRAINED_VOCAB = 300
"""256 byte pieces, the control pieces and room for a few letters."""
MAX_SEED = 2**63 - 1
"""Seeds stay within a signed 64-bit integer: TOML, JSON and torch all hold it."""


@config
class SourceConfig:
    """One prepared folder in the training blend."""

    path: str
    """Folder that `mpotrain prepare` wrote."""
    weight: float = 1.0
    """Share of samples drawn from this folder, relative to the weights of the other sources."""

    def problems(self, where: str) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key."""
        return collect_problems(
            lambda: self._path_problems(f"{where}.path"),
            lambda: self._weight_problems(f"{where}.weight"),
        )

    def _path_problems(self, where: str) -> list[str]:
        if self.path.strip():
            return []
        return [f"{where}: is empty; name a folder that `mpotrain prepare` wrote"]

    def _weight_problems(self, where: str) -> list[str]:
        if math.isfinite(self.weight) and self.weight > 0:
            return []
        return [f"{where}: is {self.weight} but must be a positive number"]


@config
class DataConfig:
    """What a run trains on and is evaluated on."""

    sources: tuple[SourceConfig, ...]
    """Prepared folders and their weights; all must share one tokenizer."""
    sequence_length: int
    """Tokens in one sample (T); the sample holds one more for the last target."""
    seed: int = 0
    """Seed of the sample order; the same documents stay in the same split for every seed."""
    split: tuple[float, float, float] = (0.98, 0.01, 0.01)
    """Fractions of the documents for training, validation and test; they sum to 1."""
    shuffle: bool = True
    """Visit the training samples in a random order, a new one each epoch."""
    objective: ObjectiveConfig = CausalConfig()
    """What is predicted: the next token, masked tokens, or dropped spans."""

    def problems(self, where: str) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key."""
        length = sound_or(lambda: self.sequence_length, None)
        return collect_problems(
            lambda: self._source_problems(f"{where}.sources"),
            lambda: self._length_problems(f"{where}.sequence_length"),
            lambda: seed_problems(self.seed, where),
            lambda: self._split_problems(f"{where}.split"),
            lambda: self.objective.problems(f"{where}.objective", length),
        )

    def _source_problems(self, where: str) -> list[str]:
        if not self.sources:
            return [f"{where}: is empty; at least one prepared folder is needed"]

        def check(index: int) -> list[str]:
            return self.sources[index].problems(f"{where}[{index}]")

        each = (partial(check, index) for index in range(len(self.sources)))
        return collect_problems(*each, lambda: self._twice_problems(where))

    def _twice_problems(self, where: str) -> list[str]:
        paths = [normpath(source.path) for source in self.sources]
        return [
            f"{where}[{index}].path: {path!r} is listed twice; add up the weights instead"
            for index, path in enumerate(paths)
            if path in paths[:index]
        ]

    def _length_problems(self, where: str) -> list[str]:
        if self.sequence_length >= 1:
            return []
        return [f"{where}: is {self.sequence_length} but must be at least 1"]

    def _split_problems(self, where: str) -> list[str]:
        shown = list(self.split)
        if any(not math.isfinite(part) or part < 0 for part in self.split):
            return [f"{where}: is {shown} but no fraction may be negative or not finite"]
        found = []
        if abs(sum(self.split) - 1.0) > 1e-6:
            found.append(f"{where}: is {shown}, which sums to {sum(self.split):g} instead of 1")
        if self.split[0] == 0:
            found.append(f"{where}: gives no documents to training (first fraction is 0)")
        return found


@config
class SentencePieceConfig:
    """Train a sentencepiece tokenizer on the text itself (lossless: bytes where pieces end)."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    """Tag of this variant."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    """Segmentation model."""
    vocab_size: int = 8192
    """Pieces in the vocabulary, the 256 byte pieces and 3 control pieces included."""
    character_coverage: float = 0.9995
    """Share of characters that become pieces of their own; the rest is written as bytes."""
    max_training_bytes: int = 100_000_000
    """Train on a uniform sample of the documents of at most this many bytes of text."""

    def problems(self, where: str) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key."""
        found = []
        if self.vocab_size < MIN_TRAINED_VOCAB:
            found.append(
                f"{where}.vocab_size: is {self.vocab_size} but byte fallback needs at least "
                f"{MIN_TRAINED_VOCAB}"
            )
        if not 0.9 <= self.character_coverage <= 1.0:
            found.append(
                f"{where}.character_coverage: is {self.character_coverage} but must lie in 0.9..1"
            )
        if self.max_training_bytes < 1:
            found.append(
                f"{where}.max_training_bytes: is {self.max_training_bytes} but must be positive"
            )
        return found


@config
class ExistingTokenizerConfig:
    """Use a tokenizer that exists: a sentencepiece `.model` or a `tokenizer.json`."""

    kind: Literal["existing"] = "existing"
    """Tag of this variant."""
    path: str
    """File of the tokenizer, or a prepared folder whose tokenizer to take."""
    eot: str | None = None
    """Name of the token that ends a document; found by its usual names where not given."""

    def problems(self, where: str) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key."""
        if not self.path.strip():
            return [f"{where}.path: is empty; name a .model or tokenizer.json file"]
        return []


TokenizerConfig: TypeAlias = SentencePieceConfig | ExistingTokenizerConfig
"""Where the tokenizer of a prepared folder comes from (union tagged by `kind`)."""


@config
class PrepareConfig:
    """One call of `mpotrain prepare`: raw text to a folder of token shards."""

    sources: tuple[str, ...]
    """Files, folders, globs, `hf:NAME[:SUBSET]`, `installed:PACKAGES`, `synthetic:KIND`."""
    out: str
    """Folder to write."""
    tokenizer: TokenizerConfig = SentencePieceConfig()
    """Tokenizer to train or to use; sources that are tokens already need none."""
    text_column: str = "text"
    """Column or key that holds the text in jsonl, parquet, csv and hub sources."""
    per_line: bool = False
    """Take every line of a text file as a document (default: every file is one)."""
    hub_split: str = "train"
    """Which split of a hub or saved data set to read."""
    max_bytes: int | None = None
    """Stop before the document that would bring the text above this many bytes."""
    num_documents: int = 20_000
    """Documents that a synthetic source makes."""
    num_tokens: int = 1_000_000
    """Tokens that a synthetic token source makes."""
    seed: int = 0
    """Seed of synthetic sources."""
    documents_per_shard: int = 8192
    """Documents in a shard; every shard but the last has exactly this many."""
    num_workers: int | None = None
    """Tokenizing processes; 0 works in this process; default: one per CPU, at most 16."""

    def problems(self, where: str) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key."""
        found = []
        if not self.sources:
            found.append(f"{where}.sources: is empty; name at least one source")
        found += [
            f"{where}.sources[{index}]: is empty"
            for index, source in enumerate(self.sources)
            if not source.strip()
        ]
        if not self.out.strip():
            found.append(f"{where}.out: is empty; name the folder to write")
        positive = {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "documents_per_shard": self.documents_per_shard,
            "max_bytes": 1 if self.max_bytes is None else self.max_bytes,
        }
        found += [
            f"{where}.{key}: is {value} but must be at least 1"
            for key, value in positive.items()
            if value < 1
        ]
        if self.num_workers is not None and self.num_workers < 0:
            found.append(f"{where}.num_workers: is {self.num_workers} but must not be negative")
        found += seed_problems(self.seed, where)
        return found + self.tokenizer.problems(f"{where}.tokenizer")


def seed_problems(seed: int, where: str) -> list[str]:
    """Return why a number cannot be the seed of a section, `where` its dotted key."""
    if 0 <= seed <= MAX_SEED:
        return []
    return [f"{where}.seed: is {seed} but must lie in 0..2^63-1"]
