"""One shard on disk: token files, byte lengths, and the record that declares the shard whole."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from mpotrain.data.indexed import IndexedWriter, bin_path, idx_path
from mpotrain.data.manifest import ShardEntry, file_digest
from mpotrain.durable import write_durably
from mpotrain.errors import DataError
from mpotrain.schema import config, to_dict

BYTES_SUFFIX = ".bytes.npy"
"""File with the raw byte length of each document, int64 (num_documents,)."""


@config
class ShardRecord:
    """The small JSON file beside a finished shard: written last, after both token files."""

    settings_digest: str
    """Settings of the `prepare` call."""
    tokenizer_digest: str
    """Tokenizer that made the tokens."""
    entry: ShardEntry
    """What the manifest will say about the shard."""


@dataclass(frozen=True)
class ShardContext:
    """What all shards of a folder share.

    Attributes:
        folder: where they are written.
        dtype: element type of the tokens.
        vocab_size: ids lie below it.
        settings_digest: settings of the `prepare` call.
        tokenizer_digest: tokenizer that makes the tokens.
    """

    folder: Path
    dtype: np.dtype[Any]
    vocab_size: int
    settings_digest: str
    tokenizer_digest: str


def shard_name(index: int) -> str:
    """Return the file name of a shard without suffix."""
    return f"shard-{index:05d}"


class ShardWriter:
    """Collect the documents of one shard; nothing is visible before `finish`.

    Args:
        context: what all shards share.
        index: number of the shard.
    """

    def __init__(self, context: ShardContext, index: int) -> None:
        self.index = index
        self._context = context
        self._prefix = context.folder / shard_name(index)
        self._writer = IndexedWriter(self._prefix, context.dtype, context.vocab_size)
        self._sizes: list[int] = []

    def add(self, tokens: NDArray[np.integer[Any]], num_bytes: int) -> None:
        """Append one document.

        Args:
            tokens: its ids (N,).
            num_bytes: raw size of its text.
        """
        self._writer.add_document(tokens)
        self._sizes.append(num_bytes)

    def finish(self, source_digest: str) -> ShardEntry:
        """Bring the shard to disk: token files, byte lengths, then the record.

        Args:
            source_digest: digest of the raw documents.

        Returns:
            The shard's line in the manifest.

        Raises:
            StorageError: writing failed; no record declares the shard whole.
        """
        buffer = io.BytesIO()
        np.save(buffer, np.array(self._sizes, dtype="<i8"), allow_pickle=False)
        self._writer.close()
        write_durably(self._prefix.with_name(self._prefix.name + BYTES_SUFFIX), buffer.getvalue())
        entry = ShardEntry(
            name=self._prefix.name,
            num_documents=self._writer.num_documents,
            num_tokens=self._writer.num_tokens,
            num_bytes=sum(self._sizes),
            num_bin_bytes=bin_path(self._prefix).stat().st_size,
            num_idx_bytes=idx_path(self._prefix).stat().st_size,
            bin_digest=self._writer.bin_digest,
            idx_digest=self._writer.idx_digest,
            bytes_digest=str(xxhash.xxh3_128_hexdigest(buffer.getvalue())),
            source_digest=source_digest,
        )
        record = ShardRecord(
            settings_digest=self._context.settings_digest,
            tokenizer_digest=self._context.tokenizer_digest,
            entry=entry,
        )
        text = json.dumps(to_dict(record), indent=2, sort_keys=True) + "\n"
        write_durably(_record_path(self._context.folder, self.index), text.encode())
        return entry

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.abort()


def _record_path(folder: Path, index: int) -> Path:
    return folder / f"{shard_name(index)}.json"


def finished_shards(context: ShardContext) -> dict[int, ShardEntry]:
    """Find the shards that an earlier, interrupted call finished, and verify their digests.

    A shard with a missing, damaged or foreign file is left out: it will be written again.

    Args:
        context: what all shards share.

    Returns:
        The whole shards by number.

    Raises:
        DataError: a shard was made by another tokenizer than the one in the folder now.
    """
    found = {}
    for path in sorted(context.folder.glob("shard-*.json")):
        record = _read_record(path)
        number = path.stem.removeprefix("shard-")
        if record is None or not number.isdigit() or record.entry.name != path.stem:
            continue
        if record.settings_digest != context.settings_digest:
            continue
        if record.tokenizer_digest != context.tokenizer_digest:
            raise DataError(
                f"{context.folder}: the tokenizer was changed after {path.stem} was written; "
                "restore it, or remove the folder and prepare again"
            )
        if _is_whole(context.folder / path.stem, record.entry):
            found[int(number)] = record.entry
    return found


def _read_record(path: Path) -> ShardRecord | None:
    try:
        return TypeAdapter(ShardRecord).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _is_whole(prefix: Path, entry: ShardEntry) -> bool:
    expected = {
        bin_path(prefix): entry.bin_digest,
        idx_path(prefix): entry.idx_digest,
        prefix.with_name(prefix.name + BYTES_SUFFIX): entry.bytes_digest,
    }
    return all(path.is_file() and file_digest(path) == digest for path, digest in expected.items())
