"""Training of a lossless sentencepiece tokenizer on a uniform sample of a stream of documents.

The whole corpus has its say, memory stays bounded, and the same documents and settings give the
same file.
"""

from __future__ import annotations

import heapq
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import xxhash

from mpotrain.data.config import SentencePieceConfig
from mpotrain.durable import write_durably
from mpotrain.errors import DataError

PASSAGE_CHARACTERS = 2000
"""Longest passage; sentencepiece's own limit is in bytes and drops what exceeds it."""
TRAINING_THREADS = 4
"""Part of the trained file's bytes, therefore a constant and not the number of CPUs."""
_NOT_TRAINABLE = {0x0000: " ", 0x2581: " ", 0x2585: " "}
"""Characters that sentencepiece's trainer keeps for itself (it would drop the whole passage)."""


def sample_documents(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Choose documents uniformly until the size limit is reached.

    Every document draws a number (a hash of its position); those with the least numbers stay.

    Args:
        texts: the documents in their fixed order.
        max_bytes: most UTF-8 bytes to keep; one longer document alone is cut.

    Returns:
        The chosen documents in their original order.
    """
    kept: list[tuple[int, int, str, int]] = []
    total = 0
    for index, text in enumerate(texts):
        draw = xxhash.xxh3_64_intdigest(index.to_bytes(8, "little"))
        size = len(text.encode("utf-8", "replace"))
        heapq.heappush(kept, (-draw, index, text, size))
        total += size
        while total > max_bytes and len(kept) > 1:
            total -= heapq.heappop(kept)[3]
    if total > max_bytes:
        return [kept[0][2].encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")]
    return [text for _, _, text, _ in sorted(kept, key=lambda item: item[1])]


def passages(text: str) -> Iterator[str]:
    """Cut a document into passages that end at a line end where one is near.

    Newlines inside a passage stay, so that pieces such as a blank line are learned.

    Args:
        text: one document.

    Yields:
        Passages of at most `PASSAGE_CHARACTERS` characters, in order.
    """
    text = text.translate(_NOT_TRAINABLE)
    start = 0
    while start < len(text):
        stop = start + PASSAGE_CHARACTERS
        if stop < len(text):
            line_end = text.rfind("\n", start, stop)
            stop = line_end + 1 if line_end > start else stop
        yield text[start:stop]
        start = stop


def train_sentencepiece(
    texts: Iterable[str], config: SentencePieceConfig, out_path: str | Path
) -> None:
    """Train a lossless sentencepiece model and write it durably.

    No normalization, no added or removed spaces, bytes for what has no piece: every text comes
    back exactly. The same texts and settings give the same file, byte for byte.

    Args:
        texts: the documents; a uniform sample of `config.max_training_bytes` is used.
        config: kind and size of the model.
        out_path: file to write (`tokenizer.model`).

    Raises:
        DataError: no text, or too little for this vocabulary size.
        StorageError: writing failed.
    """
    sample = sample_documents(texts, config.max_training_bytes)
    pieces = [passage for text in sample for passage in passages(text)]
    if not any(piece.strip() for piece in pieces):
        raise DataError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * PASSAGE_CHARACTERS,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_advice(str(error), config)) from error
    write_durably(Path(out_path), model.getvalue())


def _training_advice(message: str, config: SentencePieceConfig) -> str:
    reason = message.rsplit("] ", 1)[-1].strip() or message
    return (
        f"a {config.model_type} vocabulary of {config.vocab_size} pieces cannot be trained on this "
        f"text: {reason} Set tokenizer.vocab_size accordingly or give more text."
    )
