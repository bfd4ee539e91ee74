"""Samples of token streams in a random order that is computed, not stored.

Sample i of a run is a pure function of (data digest, seed, i). Nothing here has a state, so a run
resumes from one number in any layout, and no sample is repeated or lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpotrain.data.config import DataConfig
from mpotrain.data.manifest import MANIFEST_NAME, Manifest, TokenizerEntry, json_digest
from mpotrain.data.objective_config import CausalConfig
from mpotrain.data.order import BLEND_BLOCK, BlendOrder, FeistelPermutation, derive_key
from mpotrain.data.stream import SPLITS, Split, TokenStream
from mpotrain.errors import DataError
from mpotrain.schema import to_dict


@lru_cache(maxsize=256)
def _epoch_order(num_samples: int, seed: int, source: int, epoch: int) -> FeistelPermutation:
    return FeistelPermutation(num_samples, derive_key(seed, source, epoch))


def shortage(
    manifest: Manifest,
    split: Split,
    fractions: Sequence[float],
    size: tuple[int, int],
    length: int,
) -> str | None:
    """Return why a split of a prepared folder gives no sample; None where it gives one.

    Args:
        manifest: of the folder.
        split: which documents.
        fractions: shares of training, validation and test.
        size: documents and tokens of the split.
        length: tokens of one sample.
    """
    num_documents, num_tokens = size
    if num_tokens >= length:
        return None
    share = fractions[SPLITS.index(split)]
    return (
        f"the {split} split ({share:g} of {manifest.num_documents} documents) holds "
        f"{num_documents} documents with {num_tokens} tokens, less than one sample of {length}; "
        "give it a larger fraction (data.split), shorten data.sequence_length, or prepare more "
        "documents (a text file is one document unless it is taken per line)"
    )


class TokenDataset:
    """Windows of tokens over one split of one prepared folder.

    Window s begins at token s*stride of the stream and holds stride + overlap tokens. Where next
    tokens are predicted, neighbours share one token, the last target of one and the first input of
    the next, so every token but the first is predicted once an epoch. A remainder shorter than a
    window is left out.

    Args:
        folder: folder that `mpotrain prepare` wrote.
        split: which documents.
        seed: seed of the order.
        split_fractions: shares of training, validation and test.
        stride: tokens from one window to the next.
        overlap: tokens that neighbours share.
        source: number of this folder in a blend; each has its own order.
        shuffle: random order, another one each epoch; otherwise the order of the stream.
        verify: compare the digests of all shards, not only their sizes.

    Attributes:
        stream: the tokens.
        num_samples: windows of one epoch.

    Raises:
        DataError: damaged files, or fewer tokens in the split than one window.
    """

    def __init__(
        self,
        folder: str | Path,
        split: Split,
        seed: int,
        split_fractions: Sequence[float],
        stride: int,
        *,
        overlap: int = 1,
        source: int = 0,
        shuffle: bool = True,
        verify: bool = False,
    ) -> None:
        self.stream = TokenStream(folder, split, split_fractions, verify=verify)
        self.num_samples = max(self.stream.num_tokens - overlap, 0) // stride
        self._stride = stride
        self._length = stride + overlap
        self._seed = seed
        self._source = source
        self._shuffle = shuffle
        size = (self.stream.num_documents, self.stream.num_tokens)
        problem = shortage(self.stream.manifest, split, split_fractions, size, self._length)
        if problem is not None:
            raise DataError(f"{folder}: {problem}")

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Return the tokens of one sample.

        Args:
            index: number of the sample over all epochs, >= 0; there is no end.

        Returns:
            Token ids, int64 (stride + overlap,).
        """
        if index < 0:
            raise IndexError(f"sample {index}: samples are counted from 0")
        epoch, number = divmod(index, self.num_samples)
        if self._shuffle:
            number = _epoch_order(self.num_samples, self._seed, self._source, epoch)(number)
        return self.window(number)

    def window(self, number: int) -> npt.NDArray[np.int64]:
        """Return window `number` of the stream, in the order of the stream."""
        return self.stream.read(number * self._stride, self._length)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of raw text of a token of this split, on average over the whole split; exact.

        Mean nats per token / ln 2 / bytes_per_token = bits per byte. None where there is no text.
        """
        return self.stream.num_bytes / self.stream.num_tokens if self.stream.num_bytes else None


class BlendedDataset:
    """Samples of several prepared folders in fixed proportions.

    Args:
        data: which folders with which weights, sequence length, seed, split fractions, and the
            objective, which decides how many tokens a sample takes.
        split: which documents.
        verify: compare the digests of all shards, not only their sizes.

    Attributes:
        sources: one dataset for each folder.
        data: the configuration.
        sequence_length: T.
        split: which documents.
        num_samples: samples of one epoch: how many come before any source begins its second.

    Raises:
        DataError: damaged files, too little data, sources that do not share one tokenizer, or a
            weight too small to be kept.
    """

    def __init__(self, data: DataConfig, split: Split, *, verify: bool = False) -> None:
        self.split = split
        self.sequence_length = data.sequence_length
        self.data = data
        window = data.objective.window(data.sequence_length)
        try:
            self._order = BlendOrder([source.weight for source in data.sources])
        except ValueError as error:
            raise DataError(f"data.sources: {error}") from error
        self.sources = tuple(
            TokenDataset(
                source.path,
                split,
                data.seed,
                data.split,
                window.stride,
                overlap=window.overlap,
                source=number,
                shuffle=data.shuffle,
                verify=verify,
            )
            for number, source in enumerate(data.sources)
        )
        _check_tokenizers([source.stream for source in self.sources])
        self.num_samples = min(
            self._order.position(number, source.num_samples)
            for number, source in enumerate(self.sources)
        )

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Return the tokens of sample `index` of the run: int64 (L,); there is no end.

        L is what the objective takes: T + 1 where next tokens are predicted.
        """
        source, within = self._order(index)
        return self.sources[source][within]

    def fixed(self, index: int) -> npt.NDArray[np.int64]:
        """Return sample `index` of the unshuffled blend, the same for every seed.

        Args:
            index: 0 <= index < `num_samples`; within this range no window repeats.

        Returns:
            Token ids, int64 (L,).
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        source, within = self._order(index)
        return self.sources[source].window(within)

    def epochs(self, consumed_samples: int) -> tuple[float, ...]:
        """Return how often each source was seen after so many samples (1.0 = all of it once)."""
        blocks = consumed_samples / BLEND_BLOCK
        return tuple(
            blocks * count / source.num_samples
            for count, source in zip(self._order.counts, self.sources, strict=True)
        )

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer that all sources share."""
        return self.sources[0].stream.manifest.tokenizer

    @property
    def tokenizer_path(self) -> Path | None:
        """File of the tokenizer; None for an identity tokenizer."""
        name = self.tokenizer.file
        return None if name is None else self.sources[0].stream.folder / name

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of raw text of a token, on average over the blend; None where some have none."""
        found = [source.bytes_per_token for source in self.sources]
        weighted = [
            count * each
            for count, each in zip(self._order.counts, found, strict=True)
            if each is not None
        ]
        return sum(weighted) / BLEND_BLOCK if len(weighted) == len(found) else None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides which tokens sample i holds and what is masked, in JSON types.

        Paths are not part of it: a folder may move. `changes` compares two fingerprints.
        """
        data = self.data
        # Plain next-token prediction is left out: runs recorded before there was a choice go on.
        plain = data.objective == CausalConfig()
        objective = {} if plain else {"data.objective": to_dict(data.objective)}
        return objective | {
            "data.sources": [source.stream.manifest.digest for source in self.sources],
            "data.sources.weight": [count / BLEND_BLOCK for count in self._order.counts],
            "data.sequence_length": data.sequence_length,
            "data.seed": data.seed,
            "data.split": list(data.split),
            "data.shuffle": data.shuffle,
            "split": self.split,
            "tokenizer": self.tokenizer.digest,
        }

    @property
    def digest(self) -> str:
        """Fingerprint as one xxh3-128 in hexadecimal."""
        return json_digest(self.fingerprint)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what differs between two fingerprints.

    Args:
        before: fingerprint that a checkpoint recorded.
        now: fingerprint of the data that is configured now.

    Returns:
        One line for each difference, beginning with its key; empty when sample i is the same.
    """
    lines = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{key}.{line}" for line in changes(old, new)]
        elif old != new:
            lines.append(f"{key}: was {old}, is {new}")
    return lines


def _check_tokenizers(streams: Sequence[TokenStream]) -> None:
    first = streams[0]
    for other in streams[1:]:
        if other.manifest.tokenizer.digest != first.manifest.tokenizer.digest:
            ours, theirs = (
                stream.folder / (stream.manifest.tokenizer.file or MANIFEST_NAME)
                for stream in (first, other)
            )
            raise DataError(
                f"{ours} and {theirs} are different tokenizers; sources of one blend must share "
                f"one: prepare {other.folder} again with the tokenizer of {first.folder}"
            )
