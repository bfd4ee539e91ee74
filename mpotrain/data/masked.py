"""Masked prediction with sentence order: windows of text to batches for an encoder."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpotrain.batch import Batch
from mpotrain.data.collation import Samples, padded_batch
from mpotrain.data.draws import sample_keys
from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.masked_config import MaskedConfig
from mpotrain.data.masking import choose_tokens, choose_words, replace
from mpotrain.data.packing import Packer
from mpotrain.data.stream import Split


class MaskedObjective:
    """Predicts masked tokens, dynamically: a sample that comes again has another mask.

    Targets are the tokens themselves, and the loss mask says which of them count.

    Args:
        config: rates, segments, ids.
        sequence_length: T.
        seed: data.seed; fixed samples have the same masks for every seed.
        split: which documents the samples are of.
        tokenizer: the tokenizer of the data.
        word_starts: which ids begin a word, bool (V,); needed for whole words alone.

    Raises:
        DataError: the tokenizer lacks what the configuration needs.
        ValueError: whole words are wanted, and it is not said what begins one.
    """

    def __init__(
        self,
        config: MaskedConfig,
        *,
        sequence_length: int,
        seed: int,
        split: Split,
        tokenizer: TokenizerEntry,
        word_starts: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        if config.whole_word and word_starts is None:
            raise ValueError("whole words cannot be chosen without knowing which ids begin a word")
        self._config = config
        self._ids = config.special(tokenizer)
        self._window = config.window(sequence_length)
        self._seed = seed
        self._split = split
        self._word_starts = word_starts if config.whole_word else None
        # A random token is text: BERT also drew marks, which never stand there otherwise.
        marks = [mark for mark in vars(self._ids).values() if mark is not None]
        self._vocabulary = np.setdiff1d(np.arange(tokenizer.vocab_size), marks)
        self._pack = Packer(
            sequence_length,
            self._ids,
            pairs=config.pairs,
            min_segment=config.min_segment,
            document_mask=config.document_mask,
        )

    @property
    def sample_length(self) -> int:
        """Tokens of one sample: T less the marks of one sequence."""
        return self._window.length

    def collate(self, samples: Samples, num_rows: int) -> Batch:
        """Return masked rows with their documents, positions and segments."""
        keys = sample_keys(self._seed, self._split, samples.numbers, fixed=samples.fixed)
        rows = self._pack(samples.tokens, keys)
        rate = self._config.rate
        if self._word_starts is None:
            chosen = choose_tokens(rows.is_text, keys, rate)
        else:
            # Marks and padding have no entry in the table and begin no word.
            starts = self._word_starts[np.where(rows.is_text, rows.tokens, 0)]
            chosen = choose_words(rows.is_text, rows.begins | starts, keys, rate)
        inputs = replace(
            rows.tokens,
            chosen,
            keys,
            mask=self._ids.mask,
            shares=(self._config.mask_share, self._config.random_share),
            vocabulary=self._vocabulary,
        )
        columns = {
            "inputs": inputs,
            "targets": rows.tokens,
            "loss_mask": chosen,
            "document_ids": rows.document_ids,
            "positions": rows.positions,
            "token_types": rows.token_types,
        }
        if self._config.pairs:
            columns["pair_labels"] = rows.pair_labels
        return padded_batch(columns, samples.numbers, num_rows)
