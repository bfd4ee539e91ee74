"""Next-token prediction, with or without walls between the documents of a window."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpotrain.batch import Batch
from mpotrain.data.collation import Samples, document_numbers, padded_batch


class CausalObjective:
    """Predicts the next token at every position.

    With an end-of-text id the batch says which document each token belongs to. Its end is read by
    the document that it ends; from there the first token of the next document is predicted, as it
    is without the mask.

    Args:
        sequence_length: T.
        eot: id that ends a document, where documents are kept apart; else None.
    """

    def __init__(self, sequence_length: int, eot: int | None = None) -> None:
        self._length = sequence_length
        self._eot = eot

    @property
    def sample_length(self) -> int:
        """Tokens of one sample: T + 1."""
        return self._length + 1

    def collate(self, samples: Samples, num_rows: int) -> Batch:
        """Return inputs and the tokens after them; every target of a sample counts."""
        inputs, targets = samples.tokens[:, :-1], samples.tokens[:, 1:]
        loss_mask = np.ones(inputs.shape, dtype=np.bool_)
        columns: dict[str, npt.NDArray[Any]] = {
            "inputs": inputs,
            "targets": targets,
            "loss_mask": loss_mask,
        }
        if self._eot is not None:
            columns["document_ids"], columns["positions"] = document_numbers(inputs, self._eot)
        return padded_batch(columns, samples.numbers, num_rows)
