"""From the texts of an example to the tokens that an encoder reads."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class TextEncoder(Protocol):
    """What turns text into ids; every `mpotrain.data.tokenizer.Tokenizer` does."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without marks."""


class ExampleEncoder:
    """Writes [CLS] A [SEP], or [CLS] A [SEP] B [SEP], as in pretraining.

    Token types are 0 up to the first [SEP] and 1 behind it. Texts that are too long lose tokens at
    their ends, always the one that is longer at the moment.
    """

    def __init__(
        self,
        tokenizer: TextEncoder,
        *,
        cls_id: int,
        sep_id: int,
        sequence_length: int,
        num_token_types: int = 2,
    ) -> None:
        """Prepare an encoder.

        Args:
            tokenizer: of the pretrained model.
            cls_id: id before every sequence.
            sep_id: id after every text.
            sequence_length: tokens T of a row, marks included.
            num_token_types: with one, both texts have type 0.
        """
        self._tokenizer = tokenizer
        self._cls, self._sep = cls_id, sep_id
        self._length = sequence_length
        self._second_type = min(1, num_token_types - 1)

    @property
    def sequence_length(self) -> int:
        """Tokens of a row (T)."""
        return self._length

    def rows(self, texts: list[tuple[str, str | None]]) -> tuple[Ints, Ints, Ints]:
        """Encode some examples.

        Args:
            texts: first and second text of each.

        Returns:
            Token ids, token types, and 1 for tokens and 0 for padding; int64 (n, T) each. Ids and
            types of padding are 0.
        """
        shape = (len(texts), self._length)
        ids, types, real = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        for row, (text, pair) in enumerate(texts):
            found, second_from = self._sequence(text, pair)
            ids[row, : len(found)] = found
            types[row, second_from : len(found)] = self._second_type
            real[row, : len(found)] = 1
        return ids, types, real

    def _sequence(self, text: str, pair: str | None) -> tuple[list[int], int]:
        """Return the tokens of an example, and where those of its second text begin."""
        first = self._tokenizer.encode(text)
        if pair is None:
            sequence = [self._cls, *first[: self._length - 2], self._sep]
            return sequence, len(sequence)
        second = self._tokenizer.encode(pair)
        a, b = kept_tokens(len(first), len(second), self._length - 3)
        return [self._cls, *first[:a], self._sep, *second[:b], self._sep], a + 2


def kept_tokens(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of two texts stay, cutting the longer one (at a tie the second).

    Args:
        first: tokens of the first text.
        second: tokens of the second text.
        room: tokens for both.
    """
    if first + second <= room:
        return first, second
    if first <= room // 2:
        return first, room - first
    if second <= room // 2:
        return room - second, second
    return room - room // 2, room // 2
