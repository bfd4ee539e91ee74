"""Rows of [CLS] A [SEP] B [SEP] from windows of text that may hold the ends of documents.

Sentence order (Lan et al., "ALBERT", ICLR 2020, section 3.1): A and B are neighbours in the text,
and half of the time B comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpotrain.batch import NO_PAIR
from mpotrain.data.draws import Purpose, uniform
from mpotrain.data.special_ids import MaskedTokens

_SHORTEST = 3
"""Tokens of the shortest sequence: its marks and one token."""


@dataclass(frozen=True)
class Rows:
    """Rows of sequences with their marks; n rows of T tokens, 0 where there is padding.

    Attributes:
        tokens: ids, int64 (n, T).
        is_text: tokens of the stream, neither marks nor padding, bool (n, T).
        begins: the first token of each segment, bool (n, T).
        document_ids: int64 (n, T), 0 for padding; see `mpotrain.batch.Batch`.
        positions: int64 (n, T).
        token_types: int64 (n, T), 1 for the second segment and the mark after it.
        pair_labels: int64 (n, T), at CLS 0 for segments in order and 1 for swapped ones.
    """

    tokens: npt.NDArray[np.int64]
    is_text: npt.NDArray[np.bool_]
    begins: npt.NDArray[np.bool_]
    document_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    token_types: npt.NDArray[np.int64]
    pair_labels: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, num_rows: int, length: int) -> Rows:
        """Return rows of padding alone."""

        def zeros(dtype: type) -> npt.NDArray[Any]:
            return np.zeros((num_rows, length), dtype=dtype)

        return cls(
            tokens=zeros(np.int64),
            is_text=zeros(np.bool_),
            begins=zeros(np.bool_),
            document_ids=zeros(np.int64),
            positions=zeros(np.int64),
            token_types=zeros(np.int64),
            pair_labels=np.full((num_rows, length), NO_PAIR, dtype=np.int64),
        )


class Packer:
    """Lays windows of text out as rows.

    A window inside one document is one sequence that fills the row. Where documents end, each
    piece is a sequence with marks of its own, and the end-of-text token gives its place to them;
    since two pieces need more marks than that, the last tokens of the window give way. What is
    too short for a sequence at the end of a row is padding.

    Args:
        length: T, tokens of a row.
        ids: the marks.
        pairs: cut sequences in two segments.
        min_segment: fewest tokens of a segment.
        document_mask: number the documents, and begin the positions of each at 0; otherwise all
            that is not padding is document 1 and positions run through the row.
    """

    def __init__(
        self, length: int, ids: MaskedTokens, *, pairs: bool, min_segment: int, document_mask: bool
    ) -> None:
        self._length = length
        self._ids = ids
        self._pairs = pairs
        self._min_segment = min_segment
        self._document_mask = document_mask

    def __call__(self, windows: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64]) -> Rows:
        """Lay out windows.

        Args:
            windows: tokens of the stream, int64 (n, W).
            keys: key of each sample, uint64 (n,).

        Returns:
            n rows of T tokens.
        """
        rows = Rows.empty(len(windows), self._length)
        most = self._length // _SHORTEST
        cuts = uniform(keys, Purpose.CUT, most)
        swaps = uniform(keys, Purpose.SWAP, most) < 0.5
        for row, window in enumerate(windows):
            start = 0
            for number, text in enumerate(self._pieces(window)):
                if self._length - start < _SHORTEST:
                    break
                segments = self._segments(text, self._length - start, cuts[row, number])
                swapped = len(segments) == 2 and bool(swaps[row, number])
                stop = self._place(rows, row, start, segments[::-1] if swapped else segments)
                rows.document_ids[row, start:stop] = number + 1 if self._document_mask else 1
                if len(segments) == 2:
                    rows.pair_labels[row, start] = int(swapped)
                start = stop
        if not self._document_mask:
            rows.positions[:] = np.arange(self._length)
        return rows

    def _pieces(self, window: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the parts of each document in a window, without the tokens that end them."""
        eot, start = self._ids.eot, 0
        ends = [] if eot is None else np.flatnonzero(window == eot).tolist()
        for end in [*ends, len(window)]:
            if end > start:
                yield window[start:end]
            start = end + 1

    def _segments(
        self, text: npt.NDArray[np.int64], room: int, draw: float
    ) -> list[npt.NDArray[np.int64]]:
        """Cut a text such that it fits in a row with its marks, in two segments if it is long."""
        length = min(len(text), room - 3)
        spare = length - 2 * self._min_segment
        if not self._pairs or spare < 0:
            return [text[: room - 2]]
        border = self._min_segment + int(draw * (spare + 1))
        return [text[:border], text[border:length]]

    def _place(
        self, rows: Rows, row: int, start: int, segments: list[npt.NDArray[np.int64]]
    ) -> int:
        """Write one sequence, and return where the next may begin."""
        rows.tokens[row, start] = self._ids.cls
        at = start + 1
        for number, segment in enumerate(segments):
            stop = at + len(segment)
            rows.tokens[row, at:stop] = segment
            rows.is_text[row, at:stop] = True
            rows.begins[row, at] = True
            rows.tokens[row, stop] = self._ids.sep
            rows.token_types[row, at : stop + 1] = number
            at = stop + 1
        if self._document_mask:
            rows.positions[row, start:at] = np.arange(at - start)
        return at
