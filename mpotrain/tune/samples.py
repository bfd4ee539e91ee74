"""Examples of a task as samples of a run: their order, their batches, their fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpotrain.batch import Batch
from mpotrain.data.collation import Samples, padded_batch
from mpotrain.data.manifest import TokenizerEntry, json_digest
from mpotrain.data.order import FeistelPermutation, derive_key
from mpotrain.tune.encoding import ExampleEncoder
from mpotrain.tune.task_file import Examples


class TaskSamples:
    """Numbers of examples by the number of the sample; what `Loader` reads.

    Sample i of a run is a pure function of (number of examples, seed, i): every epoch visits all
    examples once, in an order of its own. A sample is the number of its example, which
    `TaskObjective` turns into tokens.

    Attributes:
        examples: the examples.
        sequence_length: tokens of an encoded example (T).
        num_samples: examples.
    """

    def __init__(self, examples: Examples, sequence_length: int, seed: int) -> None:
        """Prepare the order.

        Args:
            examples: what the file holds.
            sequence_length: T.
            seed: seed of the order.
        """
        self.examples = examples
        self.sequence_length = sequence_length
        self.num_samples = len(examples)
        self._seed = seed
        self._order: tuple[int, FeistelPermutation] | None = None

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Return the example of sample `index` of the endless training order: int64 (1,)."""
        if index < 0:
            raise IndexError(f"sample {index}: samples are counted from 0")
        epoch, number = divmod(index, self.num_samples)
        order = self._order
        if order is None or order[0] != epoch:
            key = derive_key(self._seed, epoch)
            order = self._order = epoch, FeistelPermutation(self.num_samples, key)
        return np.array([order[1](number)], dtype=np.int64)

    def fixed(self, index: int) -> npt.NDArray[np.int64]:
        """Return the example of sample `index` of the order of the file: int64 (1,)."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return np.array([index], dtype=np.int64)


class TaskObjective:
    """Turns numbers of examples into batches: tokens, and one target for each row.

    Attributes:
        sample_length: numbers of one sample: 1.
    """

    sample_length = 1

    def __init__(self, examples: Examples, encoder: ExampleEncoder) -> None:
        """Prepare the batches.

        Args:
            examples: what the file holds.
            encoder: writes their tokens.
        """
        self._examples, self._encoder = examples, encoder

    def collate(self, samples: Samples, num_rows: int) -> Batch:
        """Return a batch: inputs (B, T), targets and loss_mask (B, 1); padding has document 0.

        Args:
            samples: numbers of n <= `num_rows` examples, (n, 1).
            num_rows: rows B of the batch.
        """
        chosen = samples.tokens[:, 0]
        texts, pairs = self._examples.texts, self._examples.pairs
        ids, types, real = self._encoder.rows(
            [(texts[n], None if pairs is None else pairs[n]) for n in chosen.tolist()]
        )
        columns: dict[str, npt.NDArray[Any]] = {
            "inputs": ids,
            "targets": self._examples.labels[chosen][:, None],
            "loss_mask": np.ones((len(chosen), 1), dtype=np.bool_),
            "document_ids": real,
            "token_types": types,
        }
        return padded_batch(columns, samples.numbers, num_rows)


class TaskData:
    """What a checkpoint remembers of the training examples.

    Attributes:
        samples: the training examples in their order.
        tokenizer: of the pretrained model.
        tokenizer_path: its file; None where the text is token ids.
        fingerprint: everything that decides what sample i is, in JSON types.
    """

    def __init__(
        self,
        samples: TaskSamples,
        tokenizer: TokenizerEntry,
        tokenizer_path: Path | None,
        settings: dict[str, Any],
    ) -> None:
        """Gather what decides the samples.

        Args:
            samples: the training examples.
            tokenizer: of the pretrained model.
            tokenizer_path: its file.
            settings: what else decides the tokens of an example, by dotted key.
        """
        self.samples = samples
        self.tokenizer, self.tokenizer_path = tokenizer, tokenizer_path
        self.fingerprint: dict[str, Any] = settings | {
            "task.train": samples.examples.digest,
            "task.sequence_length": samples.sequence_length,
            "tokenizer": tokenizer.digest,
        }

    @property
    def digest(self) -> str:
        """Fingerprint as one xxh3-128 in hexadecimal."""
        return json_digest(self.fingerprint)
