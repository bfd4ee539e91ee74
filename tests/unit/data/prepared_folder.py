"""Writes small prepared folders straight from token ids, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpotrain.data.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from mpotrain.data.manifest import (
    Manifest,
    ShardEntry,
    TokenizerEntry,
    file_digest,
    tokenizer_digest,
    write_manifest,
)


def write_folder(
    folder: Path,
    documents: Sequence[np.ndarray],
    *,
    vocab_size: int,
    documents_per_shard: int = 7,
    raw_bytes: Sequence[int] | None = None,
    eot_id: int | None = None,
) -> Path:
    folder.mkdir(parents=True)
    dtype = token_dtype(vocab_size)
    raw = np.zeros(len(documents), np.int64) if raw_bytes is None else np.asarray(raw_bytes)
    shards = []
    for number, start in enumerate(range(0, len(documents), documents_per_shard)):
        part = slice(start, start + documents_per_shard)
        prefix = folder / f"shard-{number:05d}"
        with IndexedWriter(prefix, dtype, vocab_size) as writer:
            for document in documents[part]:
                writer.add_document(np.asarray(document))
        np.save(folder / f"{prefix.name}.bytes.npy", raw[part].astype(np.int64))
        shards.append(
            ShardEntry(
                name=prefix.name,
                num_documents=len(documents[part]),
                num_tokens=sum(len(document) for document in documents[part]),
                num_bytes=int(raw[part].sum()),
                num_bin_bytes=bin_path(prefix).stat().st_size,
                num_idx_bytes=idx_path(prefix).stat().st_size,
                bin_digest=writer.bin_digest,
                idx_digest=writer.idx_digest,
                bytes_digest=file_digest(folder / f"{prefix.name}.bytes.npy"),
                source_digest="",
            )
        )
    tokenizer = TokenizerEntry(
        kind="identity",
        digest=tokenizer_digest("identity", "", vocab_size, eot_id),
        vocab_size=vocab_size,
        eot_id=eot_id,
    )
    write_manifest(
        folder,
        Manifest(
            dtype=dtype.name, tokenizer=tokenizer, shards=tuple(shards), settings_digest="test"
        ),
    )
    return folder
