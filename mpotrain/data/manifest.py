"""The manifest of a prepared folder: what is in it, with digests. No torch here.

A folder is complete exactly when `manifest.json` is there: it is written last, by an atomic
rename. Everything a reader needs to trust the shards stands in it.
"""

from __future__ import annotations

import json
from dataclasses import field
from pathlib import Path

import xxhash
from pydantic import TypeAdapter, ValidationError

from mpotrain.durable import write_durably
from mpotrain.errors import DataError
from mpotrain.schema import config, to_dict

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
READ_BLOCK = 1 << 22
"""Bytes per read when a file is digested."""

Extra = dict[str, str | int | float]
"""Facts about a source that a reader may want, for example its exact entropy rate."""


@config
class ShardEntry:
    """One shard: its files, their sizes and digests, and what they hold."""

    name: str
    """File name without suffix: `.bin`, `.idx` and `.bytes.npy` follow it."""
    num_documents: int
    """Documents (each ends with the end-of-text token where the tokenizer has one)."""
    num_tokens: int
    """Tokens, end-of-text tokens included."""
    num_bytes: int
    """Bytes of raw UTF-8 text; 0 where the source has no text."""
    num_bin_bytes: int
    """Size of the token file."""
    num_idx_bytes: int
    """Size of the index file."""
    bin_digest: str
    """xxh3-128 of the token file."""
    idx_digest: str
    """xxh3-128 of the index file."""
    bytes_digest: str
    """xxh3-128 of `.bytes.npy`, the raw byte length of each document (int64)."""
    source_digest: str
    """xxh3-128 of the raw documents, to notice a source that changed."""


@config
class TokenizerEntry:
    """The tokenizer that made the tokens."""

    kind: str
    """`sentencepiece`, `huggingface` or `identity` (the source is tokens already)."""
    file: str | None = None
    """File name inside the folder; none for `identity`."""
    digest: str
    """What `tokenizer_digest` gives: equal digests mean equal tokens."""
    vocab_size: int
    """Ids lie below it."""
    eot_id: int | None = None
    """Id that ends every document; none where documents are not terminated."""


@config
class Manifest:
    """Content of a prepared folder."""

    format_version: int = FORMAT_VERSION
    """Version of this file's layout."""
    dtype: str
    """numpy name of the element type of the token files."""
    tokenizer: TokenizerEntry
    """The tokenizer that made the tokens."""
    shards: tuple[ShardEntry, ...]
    """The shards in document order."""
    num_empty_documents: int = 0
    """Documents of the source that held no text and were dropped."""
    sources: tuple[str, ...] = ()
    """Where the documents came from, in words."""
    settings_digest: str
    """Digest of the settings that made the folder; equal settings give equal folders."""
    extra: Extra = field(default_factory=dict)
    """Facts about the source, for example `entropy_rate` in nats per token."""

    @property
    def num_documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of raw text in all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """Data digest: equal exactly when the tokens, their order and the tokenizer are equal."""
        content = {
            "dtype": self.dtype,
            "tokenizer": [self.tokenizer.digest, self.tokenizer.vocab_size, self.tokenizer.eot_id],
            "shards": [[s.num_documents, s.bin_digest, s.idx_digest] for s in self.shards],
        }
        return json_digest(content)


def json_digest(content: object) -> str:
    """Return the xxh3-128 (hex) of plain data in canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def file_digest(path: Path) -> str:
    """Return the xxh3-128 (hex) of a file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as stream:
            while block := stream.read(READ_BLOCK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return str(digest.hexdigest())


def tokenizer_digest(kind: str, content: str, vocab_size: int, eot_id: int | None) -> str:
    """Return the digest of a tokenizer: the same only if all tokens come out the same.

    Args:
        kind: see `TokenizerEntry.kind`.
        content: digest of its file; empty for `identity`.
        vocab_size: ids lie below it.
        eot_id: id that ends a document.
    """
    return json_digest([kind, content, vocab_size, eot_id])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and thereby declare the folder complete.

    Raises:
        StorageError: writing failed; the folder stays incomplete.
    """
    text = json.dumps(to_dict(manifest), indent=2, sort_keys=True) + "\n"
    write_durably(folder / MANIFEST_NAME, text.encode())


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a prepared folder.

    Args:
        folder: folder that `mpotrain prepare` wrote.

    Returns:
        The manifest; `check_files` compares it with the files.

    Raises:
        DataError: no such folder, not complete, damaged, or of another format version.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; write it with `mpotrain prepare`")
    if not path.is_file():
        raise DataError(
            f"{folder} has no {MANIFEST_NAME}: it was not prepared, or `mpotrain prepare` was "
            "interrupted; run the same prepare command again to finish it"
        )
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the folder again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}; "
            "prepare the folder again"
        )
    try:
        return TypeAdapter(Manifest).validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path}: {key}: {first['msg']} ({error.error_count()} mistakes in all); "
            "prepare the folder again"
        ) from error


def check_files(folder: str | Path, manifest: Manifest, *, verify: bool = False) -> None:
    """Compare the files of a prepared folder with its manifest.

    The tokenizer is always digested, the shards' sizes are always compared.

    Args:
        folder: the prepared folder.
        manifest: its manifest.
        verify: digest every shard too (reads the whole folder).

    Raises:
        DataError: a file is missing, truncated or changed; all such files are named.
    """
    folder = Path(folder)
    found = _tokenizer_problems(folder, manifest.tokenizer)
    for shard in manifest.shards:
        expected = [
            (f"{shard.name}.bin", shard.num_bin_bytes, shard.bin_digest),
            (f"{shard.name}.idx", shard.num_idx_bytes, shard.idx_digest),
            (f"{shard.name}.bytes.npy", None, shard.bytes_digest),
        ]
        for name, num_bytes, digest in expected:
            problem = _file_problem(folder / name, num_bytes, digest if verify else None)
            if problem:
                found.append(problem)
    if found:
        raise DataError("\n".join([*found, f"{folder}: restore these files or prepare again"]))


def _tokenizer_problems(folder: Path, entry: TokenizerEntry) -> list[str]:
    if entry.file is None:
        content = ""
    elif problem := _file_problem(folder / entry.file, None, None):
        return [problem]
    else:
        content = file_digest(folder / entry.file)
    if tokenizer_digest(entry.kind, content, entry.vocab_size, entry.eot_id) == entry.digest:
        return []
    name = entry.file or MANIFEST_NAME
    return [f"{folder / name}: the tokenizer was changed after the shards were written"]


def _file_problem(path: Path, num_bytes: int | None, digest: str | None) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if num_bytes is not None and size != num_bytes:
        return f"{path} holds {size} bytes instead of {num_bytes}: truncated or changed"
    if digest is not None and file_digest(path) != digest:
        return f"{path} was changed: its digest differs from the manifest"
    return None
