"""The seam between samples of text and micro-batches: what an objective takes and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpotrain.batch import NO_PAIR, Batch

PADDING_ID = -1
"""Sample number of a row that is there only to fill a batch."""


@dataclass(frozen=True)
class Samples:
    """Pieces of the stream of tokens, before anything is predicted of them.

    Attributes:
        tokens: int64 (n, L), L = `Objective.sample_length`; n may be 0.
        numbers: number of each sample in the endless training order, or in the fixed order.
        fixed: the numbers count in the fixed order, which evaluation reads.
    """

    tokens: npt.NDArray[np.int64]
    numbers: Sequence[int]
    fixed: bool = False


class Objective(Protocol):
    """Turns samples into micro-batches; row by row a pure function of the sample's number."""

    @property
    def sample_length(self) -> int:
        """Tokens of one sample (L)."""

    def collate(self, samples: Samples, num_rows: int) -> Batch:
        """Return a batch of the samples.

        Args:
            samples: n <= `num_rows` samples.
            num_rows: rows of the batch; those after the samples are padding: they carry
                `PADDING_ID`, and nothing in them is predicted or attended.
        """


def stack_samples(
    rows: Sequence[npt.NDArray[np.int64]], numbers: Sequence[int], length: int, *, fixed: bool
) -> Samples:
    """Put rows of tokens into one array.

    Args:
        rows: int64 (L,) each; there may be none.
        numbers: their numbers.
        length: L.
        fixed: see `Samples`.

    Raises:
        ValueError: rows of another length: the data were opened for another objective.
    """
    for row in rows:
        if row.shape != (length,):
            raise ValueError(
                f"the objective takes samples of {length} tokens and the data give {len(row)}: "
                "open both with the same data.objective and data.sequence_length"
            )
    tokens = np.stack(rows) if rows else np.zeros((0, length), dtype=np.int64)
    return Samples(tokens, numbers, fixed)


def padded_batch(
    columns: Mapping[str, npt.NDArray[Any]], numbers: Sequence[int], num_rows: int
) -> Batch:
    """Make a batch of the arrays of its fields and fill it up with rows of padding.

    Args:
        columns: arrays (n, ...) by the name of their field in `Batch`, without `sample_ids`.
        numbers: numbers of the n samples.
        num_rows: rows of the batch.
    """
    fields = {
        name: _filled(array, num_rows, NO_PAIR if name == "pair_labels" else 0)
        for name, array in columns.items()
    }
    ids = _filled(np.array(numbers, dtype=np.int64), num_rows, PADDING_ID)
    return Batch(sample_ids=ids, **fields)


def _filled(array: npt.NDArray[Any], num_rows: int, value: int) -> Tensor:
    # Always a copy: columns may be views of one array, and a batch may be changed in place.
    whole = np.full((num_rows, *array.shape[1:]), value, dtype=array.dtype)
    whole[: len(array)] = array
    return torch.from_numpy(whole)


def document_numbers(
    tokens: npt.NDArray[np.int64], eot: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number the documents of every row; the token that ends a document belongs to it.

    Args:
        tokens: int64 (n, L).
        eot: id that ends a document.

    Returns:
        document of each token, from 1 on, and its position in the document as far as the row
        shows it: int64 (n, L) each.
    """
    begins = np.zeros(tokens.shape, dtype=np.int64)
    begins[:, 1:] = tokens[:, :-1] == eot
    steps = np.arange(tokens.shape[1])
    first = np.maximum.accumulate(begins * steps, axis=1)
    return 1 + np.cumsum(begins, axis=1), steps - first
