"""Span corruption: sentinels take the place of spans, and the decoder writes the spans.

Raffel et al. (JMLR 2020), section 3.1.4, as in the published code: `random_spans_noise_mask`
chooses the spans, `noise_span_to_unique_sentinel` makes the encoder's text and
`nonnoise_span_to_unique_sentinel` the targets. A window begins with text that is kept and ends
with a span, so span k follows kept part k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpotrain.batch import Batch
from mpotrain.data.collation import Samples, document_numbers, padded_batch
from mpotrain.data.draws import Purpose, bits, sample_keys
from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.span_config import SpanCorruptionConfig
from mpotrain.data.stream import Split

Ids = npt.NDArray[np.int64]


def divide(num_items: int, num_parts: int, draws: npt.NDArray[np.uint64]) -> Ids:
    """Divide items into parts of at least one, every division with the same probability.

    Args:
        num_items: how many items, at least `num_parts`.
        num_parts: how many parts, at least 1.
        draws: random bits, uint64 (n, num_items - 1).

    Returns:
        Sizes of the parts, int64 (n, num_parts); rows sum to `num_items`.
    """
    borders = np.argsort(draws, axis=1, kind="stable")[:, : num_parts - 1]
    edges = np.zeros((len(draws), num_parts + 1), dtype=np.int64)
    edges[:, 1:-1] = np.sort(borders + 1, axis=1)
    edges[:, -1] = num_items
    return np.diff(edges, axis=1)


class SpanCorruptionObjective:
    """Drops spans of a window and has the decoder write them; all rows have the same lengths.

    With a document mask, tokens belong to the document in which they stand, sentinels to that of
    the first token of their span, and what the decoder reads to that of its span; the end belongs
    to the last document of the row.

    Args:
        config: rate, spans, ids.
        sequence_length: tokens that the encoder reads, the end included.
        seed: data.seed; fixed samples have the same spans for every seed.
        split: which documents the samples are of.
        tokenizer: the tokenizer of the data.

    Raises:
        DataError: the tokenizer lacks what the configuration needs.
    """

    def __init__(
        self,
        config: SpanCorruptionConfig,
        *,
        sequence_length: int,
        seed: int,
        split: Split,
        tokenizer: TokenizerEntry,
    ) -> None:
        self._ids = config.special(tokenizer)
        self._lengths = config.spans(sequence_length)
        self._seed = seed
        self._split = split
        self._eot = tokenizer.eot_id if config.document_mask else None

    @property
    def sample_length(self) -> int:
        """Tokens of one sample."""
        return self._lengths.window

    def collate(self, samples: Samples, num_rows: int) -> Batch:
        """Return what encoder and decoder read, and what the decoder is to write."""
        keys = sample_keys(self._seed, self._split, samples.numbers, fixed=samples.fixed)
        tokens, begins = samples.tokens, self._begins(keys)
        parts = np.cumsum(begins, axis=1) - 1
        dropped, spans = parts % 2 == 1, parts // 2
        # A sentinel stands at the first token of what is missing: of the span for the encoder, of
        # the kept part before the span for the decoder.
        sentinels = self._ids.first_sentinel - spans
        in_encoder, in_targets = ~dropped | begins, dropped | begins
        encoder = np.full((len(keys), self._lengths.encoder), self._ids.eos)
        _put(encoder[:, :-1], np.where(dropped, sentinels, tokens)[in_encoder])
        targets = np.full((len(keys), self._lengths.decoder), self._ids.eos)
        _put(targets[:, :-1], np.where(dropped, tokens, sentinels)[in_targets])
        inputs = np.full(targets.shape, self._ids.start)
        inputs[:, 1:] = targets[:, :-1]
        columns: dict[str, npt.NDArray[Any]] = {
            "inputs": inputs,
            "targets": targets,
            "loss_mask": np.ones(targets.shape, dtype=np.bool_),
            "encoder_inputs": encoder,
        }
        if self._eot is not None:
            documents, _ = document_numbers(tokens, self._eot)
            of_span = documents[dropped & begins].reshape(len(keys), self._lengths.num_spans)
            of_encoder, of_inputs = np.empty_like(encoder), np.empty_like(inputs)
            _put(of_encoder[:, :-1], documents[in_encoder])
            of_encoder[:, -1] = documents[:, -1]
            _put(of_inputs[:, 1:], np.take_along_axis(of_span, spans, axis=1)[in_targets])
            of_inputs[:, 0] = of_span[:, 0]
            columns |= {"encoder_document_ids": of_encoder, "document_ids": of_inputs}
        return padded_batch(columns, samples.numbers, num_rows)

    def _begins(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Mark where kept parts and spans begin, in turn, from the first token on: bool (n, L)."""
        lengths = self._lengths
        sizes = np.empty((len(keys), 2 * lengths.num_spans), dtype=np.int64)
        for offset, purpose, count in (
            (0, Purpose.KEPT, lengths.num_kept),
            (1, Purpose.DROPPED, lengths.num_noise),
        ):
            draws = bits(keys, purpose, count - 1)
            sizes[:, offset::2] = divide(count, lengths.num_spans, draws)
        begins = np.zeros((len(keys), lengths.window), dtype=np.bool_)
        begins[:, 0] = True
        np.put_along_axis(begins, np.cumsum(sizes, axis=1)[:, :-1], True, axis=1)
        return begins


def _put(rows: Ids, values: Ids) -> None:
    """Fill rows with values that were picked from rows of the same number, one after another."""
    rows[:] = values.reshape(rows.shape)
