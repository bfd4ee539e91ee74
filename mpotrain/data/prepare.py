"""`prepare`: raw text to a folder of token shards, restartable after any interruption.

Order of events: `prepare.json` claims the folder for its settings; the tokenizer is trained or
copied; each shard appears whole; `manifest.json` declares the folder complete. Whatever instant
the process is killed at, the same call goes on from the finished shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpotrain.data import sources
from mpotrain.data.claim import claim, finished, lock, plain
from mpotrain.data.config import ExistingTokenizerConfig, PrepareConfig
from mpotrain.data.feed import Parcel, Raw, ShardFeed, raw_text, raw_tokens, with_raw
from mpotrain.data.indexed import token_dtype
from mpotrain.data.manifest import (
    Extra,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    json_digest,
    write_manifest,
)
from mpotrain.data.progress import PrepareProgress
from mpotrain.data.shards import ShardContext, ShardWriter, finished_shards
from mpotrain.data.tokenizer import (
    IdentityTokenizer,
    Tokenizer,
    copy_tokenizer,
    load_tokenizer,
    open_tokenizer,
)
from mpotrain.data.tokenizer_training import train_sentencepiece
from mpotrain.data.workers import default_num_workers, tokenize
from mpotrain.durable import remove_unfinished, storage_errors
from mpotrain.errors import ConfigError, DataError
from mpotrain.schema import to_dict

D = TypeVar("D")
Encoded = tuple[Parcel[D], Sequence[NDArray[np.integer[Any]]]]
Encode = Callable[[Iterable[Parcel[D]]], Iterator[Encoded[D]]]


def prepare(config: PrepareConfig, *, progress: bool = False) -> Manifest:
    """Turn text into a prepared folder, or finish one that was interrupted.

    A second call with equal settings and sources changes nothing. The result does not depend on
    the number of processes.

    Args:
        config: sources, tokenizer, folder.
        progress: show a progress bar on the error stream.

    Returns:
        The manifest of the complete folder.

    Raises:
        ConfigError: the settings contradict themselves.
        DataError: unsuitable source or tokenizer, or a folder that belongs to other settings.
        StorageError: writing failed; finished shards stay, the same call goes on from them.
    """
    problems = config.problems("prepare")
    if problems:
        raise ConfigError(problems)
    folder = Path(config.out).expanduser()
    job = _TokenJob(config) if sources.token_kind(config) else _TextJob(config)
    settings_digest = json_digest(job.settings)
    if (done := finished(folder, job.settings)) is not None:
        return done
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        if (done := finished(folder, job.settings)) is not None:
            return done
        claim(folder, job.settings)
        remove_unfinished(folder)
        with PrepareProgress(enabled=progress, total_bytes=job.num_bytes) as report:
            manifest = job.run(folder, settings_digest, report)
            write_manifest(folder, manifest)
    return manifest


class _TextJob:
    """Texts through a tokenizer in parallel processes."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._eot_id: int | None = None
        self._sources = sources.open_sources(config)
        sizes = [source.num_bytes for source in self._sources]
        known = [size for size in sizes if size is not None]
        self.num_bytes = sum(known) if len(known) == len(sizes) and not config.max_bytes else None
        self.settings = plain(
            {
                "documents_per_shard": config.documents_per_shard,
                "max_bytes": config.max_bytes,
                "sources": [source.fingerprint for source in self._sources],
                "tokenizer": self._tokenizer_settings(),
            }
        )

    def _tokenizer_settings(self) -> dict[str, Any]:
        tokenizer = self._config.tokenizer
        if isinstance(tokenizer, ExistingTokenizerConfig):
            wanted = load_tokenizer(tokenizer.path, eot=tokenizer.eot)
            if wanted.kind == IdentityTokenizer.kind:
                raise DataError(f"{tokenizer.path} holds token ids; name a tokenizer for text")
            self._eot_id = wanted.eot_id
            return {"kind": tokenizer.kind, "digest": wanted.digest}
        return to_dict(tokenizer)

    def _documents(self) -> Iterator[str]:
        return sources.documents_of(self._sources, self._config.max_bytes)

    def _make_tokenizer(self, folder: Path, report: PrepareProgress) -> tuple[Path, Tokenizer]:
        tokenizer = self._config.tokenizer
        if isinstance(tokenizer, ExistingTokenizerConfig):
            path = copy_tokenizer(tokenizer.path, folder)
            return path, open_tokenizer(path, self._eot_id)
        path = folder / "tokenizer.model"
        if not path.is_file():
            report.stage("training the tokenizer")
            texts = (text for text, _ in with_raw(self._documents(), raw_text))
            train_sentencepiece(texts, tokenizer, path)
        return path, load_tokenizer(path)

    def run(self, folder: Path, settings_digest: str, report: PrepareProgress) -> Manifest:
        """Write all shards and return the manifest."""
        config = self._config
        path, tokenizer = self._make_tokenizer(folder, report)
        workers = default_num_workers() if config.num_workers is None else config.num_workers
        report.stage("tokenizing")
        return _write_all(
            _context(folder, settings_digest, tokenizer),
            self._documents(),
            raw_text,
            lambda parcels: tokenize(parcels, path, tokenizer, workers),
            documents_per_shard=config.documents_per_shard,
            tokenizer=tokenizer.entry(path.name),
            descriptions=tuple(source.description for source in self._sources),
            extra={},
            report=report,
        )


class _TokenJob:
    """A synthetic source of token ids, written as it is."""

    num_bytes = None

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._kind = sources.token_kind(config) or ""
        self.settings = plain(
            {
                "documents_per_shard": config.documents_per_shard,
                "sources": [sources.token_fingerprint(self._kind, config)],
            }
        )

    def run(self, folder: Path, settings_digest: str, report: PrepareProgress) -> Manifest:
        """Write all shards and return the manifest."""
        source = sources.token_source(self._kind, self._config)
        tokenizer = IdentityTokenizer(source.vocab_size)
        report.stage("writing tokens")
        return _write_all(
            _context(folder, settings_digest, tokenizer),
            source.documents,
            raw_tokens,
            lambda parcels: ((parcel, parcel.documents) for parcel in parcels),
            documents_per_shard=self._config.documents_per_shard,
            tokenizer=tokenizer.entry(None),
            descriptions=(f"synthetic {self._kind} (seed {self._config.seed})",),
            extra=source.extra,
            report=report,
        )


def _context(folder: Path, settings_digest: str, tokenizer: Tokenizer) -> ShardContext:
    return ShardContext(
        folder=folder,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        settings_digest=settings_digest,
        tokenizer_digest=tokenizer.digest,
    )


def _write_all(
    context: ShardContext,
    documents: Iterable[D],
    raw: Callable[[D], Raw],
    encode: Encode[D],
    *,
    documents_per_shard: int,
    tokenizer: TokenizerEntry,
    descriptions: tuple[str, ...],
    extra: Extra,
    report: PrepareProgress,
) -> Manifest:
    finished = finished_shards(context)
    feed = ShardFeed(documents, raw, documents_per_shard, finished)
    written = _write_shards(context, feed, encode(feed.parcels()), report)
    if feed.num_documents == 0:
        raise DataError(
            f"there is no document with text in {', '.join(descriptions)} "
            f"({feed.num_empty} empty ones were dropped)"
        )
    shards = finished | written
    return Manifest(
        dtype=context.dtype.name,
        tokenizer=tokenizer,
        shards=tuple(shards[index] for index in sorted(shards)),
        num_empty_documents=feed.num_empty,
        sources=descriptions,
        settings_digest=context.settings_digest,
        extra=extra,
    )


def _write_shards(
    context: ShardContext,
    feed: ShardFeed[D],
    encoded: Iterator[Encoded[D]],
    report: PrepareProgress,
) -> dict[int, ShardEntry]:
    written: dict[int, ShardEntry] = {}
    for index, group in itertools.groupby(encoded, key=lambda item: item[0].shard):
        with ShardWriter(context, index) as writer:
            for parcel, documents in group:
                for tokens, num_bytes in zip(documents, parcel.sizes, strict=True):
                    writer.add(tokens, num_bytes)
                num_tokens = sum(tokens.size for tokens in documents)
                report.advance(len(documents), sum(parcel.sizes), num_tokens)
            written[index] = writer.finish(feed.source_digest(index))
    return written
