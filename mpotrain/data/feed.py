"""Documents cut into parcels for the tokenizing processes, shard by shard.

A shard is a fixed number of documents, so its borders depend on nothing but the source. Shards
that an earlier call finished are read once more, to see that the source is still the same, but
not tokenized again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from mpotrain.data.manifest import ShardEntry
from mpotrain.data.shards import shard_name
from mpotrain.errors import DataError

PARCEL_BYTES = 1 << 18
"""A parcel is closed when its raw documents reach this size."""

D = TypeVar("D")


@dataclass
class Parcel(Generic[D]):
    """Consecutive documents of one shard.

    Attributes:
        shard: number of the shard.
        documents: texts or token ids.
        sizes: raw text bytes of each document.
    """

    shard: int
    documents: list[D] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Raw:
    """A document as bytes.

    Attributes:
        data: what the source digest covers; empty for a document to drop.
        num_text_bytes: size of the raw text (0 where there is no text).
    """

    data: bytes
    num_text_bytes: int


def raw_text(text: str) -> Raw:
    """Return a text as bytes; one of nothing but white space counts as empty.

    Raises:
        DataError: the text holds a lone surrogate, which no UTF-8 file can.
    """
    if not text.strip():
        return Raw(b"", 0)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} is a lone surrogate ({text[error.start]!a}), which is no "
            "text; clean the source"
        ) from error
    return Raw(data, len(data))


def raw_tokens(tokens: NDArray[np.int64]) -> Raw:
    """Return token ids as bytes; they have no text."""
    return Raw(np.ascontiguousarray(tokens, dtype="<i8").tobytes(), 0)


def with_raw(documents: Iterable[D], raw: Callable[[D], Raw]) -> Iterator[tuple[D, Raw]]:
    """Yield each document with its bytes.

    Args:
        documents: all documents in order.
        raw: gives a document as bytes.

    Raises:
        DataError: `raw` refuses a document; the message tells which one.
    """
    for number, document in enumerate(documents):
        try:
            data = raw(document)
        except DataError as error:
            raise DataError(f"document {number} (counted from 0): {error}") from error
        yield document, data


class ShardFeed(Generic[D]):
    """Walk over the documents once; afterwards know what was dropped and digested.

    Args:
        documents: all documents in order.
        raw: gives a document as bytes.
        documents_per_shard: size of every shard but the last.
        finished: shards that need not be written again.

    Attributes:
        num_empty: documents dropped so far.
        num_documents: documents kept so far.
    """

    def __init__(
        self,
        documents: Iterable[D],
        raw: Callable[[D], Raw],
        documents_per_shard: int,
        finished: Mapping[int, ShardEntry],
    ) -> None:
        self._documents = documents
        self._raw = raw
        self._per_shard = documents_per_shard
        self._finished = finished
        self._digests: dict[int, Any] = {}
        self.num_empty = 0
        self.num_documents = 0

    def parcels(self) -> Iterator[Parcel[D]]:
        """Yield the documents that have to be tokenized; none crosses a shard border.

        Raises:
            DataError: a finished shard does not match its documents any more, or a document is
                no text.
        """
        parcel: Parcel[D] = Parcel(0)
        size = 0
        for document, raw in self._kept():
            shard = self.num_documents // self._per_shard
            self._digest(shard, raw.data)
            self.num_documents += 1
            if shard not in self._finished:
                if parcel.documents and (shard != parcel.shard or size >= PARCEL_BYTES):
                    yield parcel
                    parcel, size = Parcel(shard), 0
                parcel.shard = shard
                parcel.documents.append(document)
                parcel.sizes.append(raw.num_text_bytes)
                size += len(raw.data)
            if self.num_documents % self._per_shard == 0:
                self._compare(shard)
        if parcel.documents:
            yield parcel
        for shard in self._finished:
            self._compare(shard)

    def source_digest(self, shard: int) -> str:
        """Return the digest of a shard's documents; call it when all of them were fed."""
        return str(self._digests[shard].hexdigest())

    def _kept(self) -> Iterator[tuple[D, Raw]]:
        for document, raw in with_raw(self._documents, self._raw):
            if raw.data:
                yield document, raw
            else:
                self.num_empty += 1

    def _digest(self, shard: int, data: bytes) -> None:
        if shard not in self._digests:
            self._digests[shard] = xxhash.xxh3_128()
        # The length in front keeps two documents apart from their concatenation.
        self._digests[shard].update(len(data).to_bytes(8, "little"))
        self._digests[shard].update(data)

    def _compare(self, shard: int) -> None:
        entry = self._finished.get(shard)
        if entry is None:
            return
        if shard not in self._digests or self.source_digest(shard) != entry.source_digest:
            raise DataError(
                f"the source changed after {shard_name(shard)} was written, so an interrupted "
                "`prepare` cannot go on; remove the folder and prepare again"
            )
