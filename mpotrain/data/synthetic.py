"""Sources with a known answer: a Markov chain, toy-English stories, tokens that tell their place.

All are pure functions of a seed and of counters: the same on every machine, of any size, and
with nothing to download.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpotrain.data.markov import MarkovChain
from mpotrain.data.order import derive_key, splitmix64_array
from mpotrain.data.stories import NUM_STORIES, story

_STORY, _LENGTH = range(2)
_BATCH = 256


@dataclass(frozen=True)
class TokenSource:
    """Documents that are token ids from the start.

    Attributes:
        documents: one-dimensional int64 arrays, one for each document, produced on demand.
        vocab_size: all ids lie in [0, vocab_size).
        extra: facts for the manifest (JSON types only), e.g. the exact entropy rate.
    """

    documents: Iterator[npt.NDArray[np.int64]]
    vocab_size: int
    extra: dict[str, Any]


def stories(num_documents: int, seed: int) -> Iterator[str]:
    """Yield toy-English stories, drawn evenly from `NUM_STORIES` (repeats are possible).

    Args:
        num_documents: how many.
        seed: which; document d is a pure function of (seed, d).

    Yields:
        Texts that `mpotrain.data.stories.check_story` accepts.
    """
    for document in range(num_documents):
        yield story(derive_key(seed, _STORY, document) % NUM_STORIES)


def markov(
    num_tokens: int, seed: int, *, vocab_size: int = 16, document_length: int = 1024
) -> TokenSource:
    """Make an order-2 Markov source; a trained model must end near its entropy rate, never below.

    The documents are independent pieces of one chain, without end-of-text tokens, so the first
    two tokens of each cost more than the entropy rate (a few tenths of a percent of the mean loss
    at the default length).

    Args:
        num_tokens: total length; the last document may be shorter than the others.
        seed: chooses the chain and the documents.
        vocab_size: number of symbols V, 2 to 256; the exact calculation holds V**3 numbers.
        document_length: tokens of a document.

    Returns:
        A source whose `extra` holds `entropy_rate` (H(X_t | two before), nats per token) and
        `order_one_entropy` (H(X_t | one before)), both exact to rounding.

    Raises:
        ValueError: a size that no chain can have.
    """
    if num_tokens < 1 or document_length < 2:
        raise ValueError(
            "num_tokens must be positive and document_length at least 2, "
            f"got {num_tokens} and {document_length}"
        )
    chain = MarkovChain(vocab_size, seed)

    def documents() -> Iterator[npt.NDArray[np.int64]]:
        total = -(-num_tokens // document_length)
        for first in range(0, total, _BATCH):
            batch = chain.sample(min(_BATCH, total - first), document_length, first)
            for number, document in enumerate(batch, start=first):
                yield document[: num_tokens - number * document_length]

    extra = {
        "kind": "markov",
        "seed": seed,
        "document_length": document_length,
        "entropy_rate": chain.entropy_rate,
        "order_one_entropy": chain.order_one_entropy,
    }
    return TokenSource(documents(), vocab_size, extra)


def positions(
    num_documents: int, seed: int, *, min_length: int = 16, max_length: int = 256
) -> TokenSource:
    """Make documents in which every token is unique and tells where it stands.

    Token k of the whole corpus is the number k, so any repeat, gap, reordering or leak between
    documents or splits shows as a plain inequality. `position_starts` gives the first token of
    each document.

    Args:
        num_documents: number of documents.
        seed: chooses their lengths.
        min_length: least tokens of a document.
        max_length: most tokens of a document.

    Returns:
        A source whose vocabulary is as large as the corpus.

    Raises:
        ValueError: no documents, or lengths that contradict each other.
    """
    starts = position_starts(num_documents, seed, min_length=min_length, max_length=max_length)

    def documents() -> Iterator[npt.NDArray[np.int64]]:
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            yield np.arange(start, stop, dtype=np.int64)

    extra = {
        "kind": "positions",
        "seed": seed,
        "num_documents": num_documents,
        "min_length": min_length,
        "max_length": max_length,
    }
    return TokenSource(documents(), int(starts[-1]), extra)


def position_starts(
    num_documents: int, seed: int, *, min_length: int = 16, max_length: int = 256
) -> npt.NDArray[np.int64]:
    """Return the first token of every document of `positions`, and the end of the corpus.

    Args:
        num_documents: number of documents D.
        seed: chooses their lengths.
        min_length: least tokens of a document.
        max_length: most tokens of a document.

    Returns:
        int64 (D + 1,): document d holds the tokens starts[d] .. starts[d + 1] - 1.

    Raises:
        ValueError: no documents, or lengths that contradict each other.
    """
    if num_documents < 1 or not 1 <= min_length <= max_length:
        raise ValueError(
            "need at least one document and 1 <= min_length <= max_length, "
            f"got {num_documents}, {min_length}, {max_length}"
        )
    counters = np.arange(num_documents, dtype=np.uint64)
    draws = splitmix64_array(counters ^ np.uint64(derive_key(seed, _LENGTH)))
    lengths = draws % np.uint64(max_length - min_length + 1) + np.uint64(min_length)
    return np.concatenate([[0], np.cumsum(lengths.astype(np.int64))]).astype(np.int64)
