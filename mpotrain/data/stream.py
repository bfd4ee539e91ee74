"""The documents of one split of a prepared folder as a single stream of tokens, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from mpotrain.data.indexed import IndexedReader
from mpotrain.data.manifest import Manifest, ShardEntry, check_files, read_manifest
from mpotrain.data.order import derive_key, splitmix64_array
from mpotrain.errors import DataError

Split: TypeAlias = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""Names of the splits, in the order of their fractions."""

# A constant: neither the seed nor the folder may move a document into another split.
_SPLIT_KEY = derive_key(*b"mpotrain split")


def split_of(documents: npt.ArrayLike, fractions: Sequence[float]) -> npt.NDArray[np.int64]:
    """Assign documents to splits by a hash of their number.

    A document keeps its split when the seed changes and when documents are appended to the
    folder; only other fractions move documents. Shares are those of a random draw, not exact.

    Args:
        documents: numbers of documents in their folder, any shape.
        fractions: shares of training, validation and test.

    Returns:
        int64, same shape: 0 for training, 1 for validation, 2 for test.
    """
    numbers = np.asarray(documents, dtype=np.uint64)
    draws = (splitmix64_array(numbers ^ np.uint64(_SPLIT_KEY)) >> np.uint64(11)) / 2.0**53
    limits = np.cumsum(fractions)[:-1]
    # Rounding in the sum must not send anything to a split whose fraction is 0.
    limits[max(index for index, part in enumerate(fractions) if part > 0) :] = 1.0
    return np.searchsorted(limits, draws, side="right").astype(np.int64)


def split_size(
    folder: Path, manifest: Manifest, split: Split, fractions: Sequence[float], enough: int
) -> tuple[int, int]:
    """Count a split without opening it, and no further than there are enough tokens.

    Args:
        folder: the prepared folder; only the index of a shard that is cut is read.
        manifest: its manifest.
        split: which documents.
        fractions: shares of training, validation and test.
        enough: tokens.

    Returns:
        Documents and tokens of the split; of its beginning where that has enough tokens.

    Raises:
        DataError: an index is missing or damaged.
    """
    num_documents = num_tokens = first = 0
    for entry in manifest.shards:
        documents = np.arange(first, first + entry.num_documents)
        chosen = split_of(documents, fractions) == SPLITS.index(split)
        first += entry.num_documents
        num_documents += int(chosen.sum())
        if chosen.all():
            num_tokens += entry.num_tokens
        elif chosen.any():
            lengths = _open_shard(folder, manifest, entry).sequence_lengths
            num_tokens += int(lengths[chosen].sum(dtype=np.int64))
        if num_tokens >= enough:
            break
    return num_documents, num_tokens


class TokenStream:
    """All tokens of the documents of a split, in document order, without copying them.

    Only the extents (runs of neighbouring documents of the split) are held in memory: where each
    begins in the stream, and where in which shard.

    Args:
        folder: folder that `mpotrain prepare` wrote.
        split: which documents.
        fractions: shares of training, validation and test.
        verify: compare the digests of all shards too, not only their sizes (reads everything).

    Attributes:
        folder: the prepared folder.
        split: which documents.
        manifest: its manifest.
        num_documents: documents of the split.
        num_tokens: tokens of the split.
        num_bytes: bytes of raw text of the split; 0 where the source has no text.

    Raises:
        DataError: a file is missing, truncated, changed or inconsistent; it is named.
    """

    def __init__(
        self,
        folder: str | Path,
        split: Split,
        fractions: Sequence[float],
        *,
        verify: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest = read_manifest(folder)
        check_files(self.folder, self.manifest, verify=verify)
        self.num_documents = 0
        self.num_bytes = 0
        self._shards: list[npt.NDArray[Any]] = []
        extents: list[npt.NDArray[np.int64]] = []
        first = 0
        for number, entry in enumerate(self.manifest.shards):
            reader = _open_shard(self.folder, self.manifest, entry)
            documents = np.arange(first, first + entry.num_documents)
            chosen = split_of(documents, fractions) == SPLITS.index(split)
            self.num_documents += int(chosen.sum())
            self.num_bytes += int(self._raw_bytes(entry)[chosen].sum())
            self._shards.append(reader.tokens)
            extents.append(_extents(number, chosen, reader.sequence_lengths))
            first += entry.num_documents
        self._shard, self._offset, lengths = np.concatenate(
            [*extents, np.zeros((3, 0), np.int64)], axis=1
        )
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Copy a piece of the stream.

        Args:
            start: position of the first token, >= 0.
            count: number of tokens; the piece must lie within the stream.

        Returns:
            Token ids, int64 (count,).
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(
                f"tokens {start}..{start + count - 1} are outside the stream of "
                f"{self.num_tokens} tokens ({self.folder}, {self.split})"
            )
        tokens = np.empty(count, dtype=np.int64)
        extent = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < count:
            skip = start + filled - int(self._starts[extent])
            length = min(count - filled, int(self._ends[extent]) - start - filled)
            offset = int(self._offset[extent]) + skip
            shard = self._shards[int(self._shard[extent])]
            tokens[filled : filled + length] = shard[offset : offset + length]
            filled += length
            extent += 1
        return tokens

    def _raw_bytes(self, entry: ShardEntry) -> npt.NDArray[np.int64]:
        path = self.folder / f"{entry.name}.bytes.npy"
        try:
            lengths: npt.NDArray[np.int64] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} is damaged ({error}); prepare the folder again") from error
        if lengths.shape != (entry.num_documents,) or lengths.dtype != np.int64:
            raise DataError(
                f"{path} holds {lengths.dtype} {lengths.shape} instead of one int64 for each of "
                f"{entry.num_documents} documents; restore the file or prepare the folder again"
            )
        return lengths


def _open_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> IndexedReader:
    reader = IndexedReader(folder / entry.name)
    found = (len(reader), reader.num_tokens, reader.dtype)
    if found != (entry.num_documents, entry.num_tokens, np.dtype(manifest.dtype)):
        raise DataError(
            f"{folder / entry.name}.idx: {found[0]} documents, {found[1]} tokens, "
            f"{found[2]}, but the manifest says {entry.num_documents}, {entry.num_tokens}, "
            f"{manifest.dtype}; restore the file or prepare the folder again"
        )
    return reader


def _extents(
    shard: int, chosen: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Merge neighbouring chosen documents of a shard.

    Args:
        shard: number of the shard.
        chosen: which documents belong to the split, bool (D,).
        lengths: tokens of each document, (D,).

    Returns:
        int64 (3, E): shard, first token within the shard, number of tokens.
    """
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    first, last = ends[edges[0::2]], ends[edges[1::2]]
    return np.stack([np.full(len(first), shard), first, last - first]).astype(np.int64)
