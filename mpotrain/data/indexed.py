r"""Reader and writer of Megatron's indexed token files (`.bin` with tokens, `.idx` with offsets).

Layout of `.idx`, little-endian, as megatron-core's `IndexedDataset` reads it: magic
`MMIDIDX\0\0`, version 1 (u64), element type code (u8), number of sequences S (u64), number of
document boundaries D (u64), S lengths (i32, in tokens), S pointers (i64, in bytes into `.bin`),
D boundaries (i64, sequence numbers, beginning with 0). Here a document is one sequence.
"""

from __future__ import annotations

import os
import struct
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mpotrain.durable import publish, storage_errors, tmp_path
from mpotrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Megatron's element type codes; the two floating types cannot hold token ids."""
MAX_SEQUENCE_TOKENS = 2**31 - 1
"""Lengths are stored as i32."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest element type that holds all ids below `vocab_size`.

    Raises:
        DataError: no supported type is wide enough.
    """
    if vocab_size < 1 or vocab_size > 2**31:
        raise DataError(f"a vocabulary of {vocab_size} tokens cannot be stored in 32-bit ids")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """Return the token file of a shard: the prefix and `.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the index file of a shard: the prefix and `.idx`."""
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Write documents one after another; the two files appear only when `close` succeeds.

    Args:
        prefix: path of the files without `.bin` and `.idx`.
        dtype: element type of the tokens (an integer type with a Megatron code).
        vocab_size: ids must lie below it; default: all ids that `dtype` holds.

    Attributes:
        num_documents: documents added so far.
        num_tokens: tokens added so far.
        bin_digest: xxh3-128 (hex) of the token file; final after `close`.
        idx_digest: xxh3-128 (hex) of the index file; empty before `close`.
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype[Any], vocab_size: int | None = None
    ) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        codes = {np.dtype(name): code for code, name in DTYPE_CODES.items()}
        if self._dtype not in codes or self._dtype.kind not in "iu":
            raise DataError(f"{prefix}: tokens cannot be stored as {self._dtype.name}")
        self._code = codes[self._dtype]
        limit = int(np.iinfo(self._dtype).max) + 1
        self._id_limit = limit if vocab_size is None else min(limit, vocab_size)
        if vocab_size is not None and vocab_size > limit:
            raise DataError(
                f"{prefix}: a vocabulary of {vocab_size} does not fit {self._dtype.name}, which "
                f"holds ids below {limit}; choose a wider type"
            )
        self._prefix = Path(prefix)
        self._bin = bin_path(prefix)
        self._idx = idx_path(prefix)
        self._unfinished_bin = tmp_path(self._bin)
        self._unfinished_idx = tmp_path(self._idx)
        self._lengths: list[int] = []
        self._digest = xxhash.xxh3_128()
        self.num_tokens = 0
        self.idx_digest = ""
        with storage_errors(self._bin):
            self._stream: BufferedWriter | None = self._unfinished_bin.open("wb")

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    @property
    def bin_digest(self) -> str:
        """xxh3-128 (hex) of the tokens added so far."""
        return str(self._digest.hexdigest())

    def add_document(self, tokens: NDArray[np.integer[Any]]) -> None:
        """Append one document.

        Args:
            tokens: ids (N,), any integer type.

        Raises:
            DataError: an id lies outside the vocabulary (nothing ever wraps), wrong shape or type.
            StorageError: writing failed.
        """
        if self._stream is None:
            raise ValueError("the writer is closed")
        tokens = self._checked(np.asarray(tokens))
        data = tokens.astype(self._dtype).tobytes()
        with storage_errors(self._bin):
            self._stream.write(data)
        self._digest.update(data)
        self._lengths.append(tokens.size)
        self.num_tokens += tokens.size

    def _checked(self, tokens: NDArray[Any]) -> NDArray[Any]:
        place = f"{self._bin.name}, document {len(self._lengths)}"
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
            raise DataError(
                f"{place}: tokens must be a list of integers, not {tokens.dtype} of shape "
                f"{tokens.shape}"
            )
        if tokens.size > MAX_SEQUENCE_TOKENS:
            raise DataError(f"{place}: has {tokens.size} tokens; the format holds 2^31-1 at most")
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._id_limit:
                raise DataError(
                    f"{place}: token id {low if low < 0 else high} lies outside 0.."
                    f"{self._id_limit - 1}; the tokenizer does not match the vocabulary size"
                )
        return tokens

    def close(self) -> None:
        """Bring both files to disk and give them their final names (`.idx` last).

        Raises:
            StorageError: writing failed; neither name refers to an unfinished file.
        """
        if self._stream is None:
            return
        try:
            with storage_errors(self._bin):
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
            index = self._index()
            self.idx_digest = str(xxhash.xxh3_128_hexdigest(index))
            with storage_errors(self._idx), self._unfinished_idx.open("wb") as stream:
                stream.write(index)
                stream.flush()
                os.fsync(stream.fileno())
            publish(self._unfinished_bin, self._bin)
            publish(self._unfinished_idx, self._idx)
            self._stream = None
        except BaseException:
            self.abort()
            raise

    def _index(self) -> bytes:
        lengths = np.array(self._lengths, dtype="<i4")
        sizes = lengths.astype("<i8") * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, "<i8"), np.cumsum(sizes, dtype="<i8")])[:-1]
        boundaries = np.arange(len(lengths) + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(boundaries))
        return header + lengths.tobytes() + pointers.tobytes() + boundaries.tobytes()

    def abort(self) -> None:
        """Drop everything that was written; no file remains."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        try:
            stream.close()
        except OSError:
            # Closing flushes; on a full disk that fails again, and the file is dropped anyway.
            stream.raw.close()
        finally:
            self._unfinished_bin.unlink(missing_ok=True)
            self._unfinished_idx.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class IndexedReader:
    """Memory-mapped view of one shard; opening checks sizes and the whole index.

    Args:
        prefix: path of the files without `.bin` and `.idx`.

    Attributes:
        dtype: element type of the tokens.
        sequence_lengths: tokens of each sequence, int32 (S,).
        pointers: byte offset of each sequence in the token file, int64 (S,).
        document_indices: number of the first sequence of each document, then S, int64 (D,).
        tokens: all tokens of the shard, sequences one after another, (num_tokens,).

    Raises:
        DataError: a file is missing, truncated, of another format or inconsistent.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._idx, self._bin = idx_path(prefix), bin_path(prefix)
        for path in (self._idx, self._bin):
            if not path.is_file():
                raise DataError(f"{path} is missing; prepare the folder again or restore the file")
        index = self._map(self._idx, np.dtype("u1"))
        num_sequences, num_boundaries = self._header(index)
        ends = np.cumsum([HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_boundaries])
        if index.size != ends[-1]:
            raise DataError(
                f"{self._idx} holds {index.size} bytes where its header announces {ends[-1]}: it "
                "is truncated or not a plain token index"
            )
        self.sequence_lengths: NDArray[np.int32] = index[ends[0] : ends[1]].view("<i4")
        self.pointers: NDArray[np.int64] = index[ends[1] : ends[2]].view("<i8")
        self.document_indices: NDArray[np.int64] = index[ends[2] : ends[3]].view("<i8")
        self._check_index()
        self.tokens: NDArray[Any] = self._map(self._bin, self.dtype)

    @staticmethod
    def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
        try:
            if path.stat().st_size == 0:  # an empty file cannot be mapped
                return np.zeros(0, dtype)
            mapped: NDArray[Any] = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error})") from error
        return mapped

    def _header(self, index: NDArray[np.uint8]) -> tuple[int, int]:
        if index.size < HEADER.size:
            raise DataError(f"{self._idx} holds {index.size} bytes: it is truncated")
        magic, version, code, num_sequences, num_boundaries = HEADER.unpack(
            index[: HEADER.size].tobytes()
        )
        if magic != MAGIC:
            raise DataError(f"{self._idx} is not a Megatron token index (wrong magic number)")
        if version != VERSION:
            raise DataError(f"{self._idx} has format version {version}; only 1 is known")
        dtype = np.dtype(DTYPE_CODES.get(code, "<f8"))
        if dtype.kind not in "iu":
            raise DataError(f"{self._idx} announces element type {code}, which holds no token ids")
        self.dtype: np.dtype[Any] = dtype
        return int(num_sequences), int(num_boundaries)

    def _check_index(self) -> None:
        lengths = self.sequence_lengths.astype(np.int64)
        ends = np.cumsum(lengths) * self.dtype.itemsize
        if np.any(lengths < 0) or np.any(self.pointers != ends - lengths * self.dtype.itemsize):
            raise DataError(
                f"{self._idx}: the sequences do not lie one after another in {self._bin.name}; "
                "the index is damaged or of an unsupported kind"
            )
        expected = int(ends[-1]) if len(ends) else 0
        actual = self._bin.stat().st_size
        if actual != expected:
            raise DataError(
                f"{self._bin} holds {actual} bytes where {self._idx.name} announces {expected}: "
                "it is truncated or belongs to another index"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole shard."""
        return int(self.tokens.size)

    def __len__(self) -> int:
        return int(self.sequence_lengths.size)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the tokens of one sequence (a view of the mapped file)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[index])]
