"""Configuration of span corruption (no torch)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.span_lengths import SHORTEST, SpanLengths, span_lengths
from mpotrain.data.special_ids import SpanTokens, require_ends
from mpotrain.data.window import Window, rate_problems
from mpotrain.errors import DataError
from mpotrain.sample import SampleLengths
from mpotrain.schema import collect_problems, config


@config
class SpanCorruptionConfig:
    """Write down the spans that were dropped from the encoder's text (T5).

    The encoder reads exactly data.sequence_length tokens, the end included. Sentinel k, which
    stands for span k, has id first_sentinel_id - k; sentinels that are not placed are appended
    behind the tokenizer's ids.
    """

    kind: Literal["span_corruption"] = "span_corruption"
    """Tag of this variant."""
    rate: float = 0.15
    """Share of the tokens of a window that are dropped."""
    mean_span: float = 3.0
    """Mean length of a dropped span."""
    document_mask: bool = False
    """Tokens see their own document alone."""
    num_sentinels: int = 100
    """Sentinels in the vocabulary; a row needs one for each of its spans."""
    first_sentinel_id: int | None = None
    """Id of the first sentinel in a vocabulary that has them (32099 in T5)."""
    eos_id: int | None = None
    """Id that ends both sequences (1 in T5); default: the tokenizer's end of text."""
    start_id: int | None = None
    """First id that the decoder reads (0 in T5); default: the tokenizer's end of text."""

    def problems(self, where: str, sequence_length: int | None) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key.

        Args:
            where: dotted key of this section.
            sequence_length: tokens of a sample; None where it cannot be read.
        """
        own = collect_problems(
            lambda: rate_problems(where, self.rate),
            lambda: self._mean_problems(f"{where}.mean_span"),
            *(partial(self._sign_problems, where, key) for key in ("eos_id", "start_id")),
            lambda: self._number_problems(f"{where}.num_sentinels"),
            lambda: self._sentinel_problems(where),
            lambda: self._length_problems(where, sequence_length),
        )
        # Numbers that are wrong in themselves would be wrong once more together.
        if own or sequence_length is None:
            return own
        return collect_problems(lambda: self._span_problems(where, self.spans(sequence_length)))

    def _mean_problems(self, where: str) -> list[str]:
        return (
            [] if self.mean_span >= 1 else [f"{where}: is {self.mean_span} but must be at least 1"]
        )

    def _sign_problems(self, where: str, key: str) -> list[str]:
        value = getattr(self, key)
        return [f"{where}.{key}: is {value} but ids begin at 0"] if (value or 0) < 0 else []

    def _number_problems(self, where: str) -> list[str]:
        if self.num_sentinels >= 1:
            return []
        return [f"{where}: is {self.num_sentinels} but must be at least 1"]

    def _length_problems(self, where: str, sequence_length: int | None) -> list[str]:
        if sequence_length is None or sequence_length >= SHORTEST:
            return []
        return [
            f"{where}: a corrupted row needs a sequence_length of at least {SHORTEST}, "
            f"but it is {sequence_length}"
        ]

    def _sentinel_problems(self, where: str) -> list[str]:
        first = self.first_sentinel_id
        if first is None or self.num_sentinels < 1:
            return []
        last = first - self.num_sentinels + 1
        if last < 0:
            return [
                f"{where}.first_sentinel_id: is {first}, so the last of {self.num_sentinels} "
                f"sentinels would have the id {last}; sentinels count downwards"
            ]
        return [
            f"{where}.{key}: is {value}, which is a sentinel ({last}..{first})"
            for key, value in (("eos_id", self.eos_id), ("start_id", self.start_id))
            if value is not None and last <= value <= first
        ]

    def _span_problems(self, where: str, lengths: SpanLengths) -> list[str]:
        if lengths.num_kept < lengths.num_spans:
            return [
                f"{where}.rate: {self.rate} leaves {lengths.num_kept} tokens between "
                f"{lengths.num_spans} spans; lower it or raise mean_span"
            ]
        if lengths.num_spans > self.num_sentinels:
            return [
                f"{where}.num_sentinels: is {self.num_sentinels}, but a row of {lengths.encoder} "
                f"tokens has {lengths.num_spans} spans and needs as many sentinels; set it to "
                f"{lengths.num_spans} or raise mean_span"
            ]
        return []

    def spans(self, sequence_length: int) -> SpanLengths:
        """Return how a window is corrupted such that the encoder reads so many tokens."""
        return span_lengths(sequence_length, self.rate, self.mean_span)

    def window(self, sequence_length: int) -> Window:
        """Return what one sample takes: more than the encoder reads, since spans are dropped."""
        return Window(self.spans(sequence_length).window)

    def lengths(self, sequence_length: int) -> SampleLengths:
        """Return the lengths of one sample."""
        decoder = self.spans(sequence_length).decoder
        return SampleLengths(sequence_length, decoder, decoder)

    def vocab_size(self, tokenizer_vocab_size: int) -> int:
        """Return how many ids a model needs for the tokens and the objective's own ids."""
        given = [self._first_sentinel(tokenizer_vocab_size), self.eos_id, self.start_id]
        return max(tokenizer_vocab_size, *(1 + value for value in given if value is not None))

    def _first_sentinel(self, vocab_size: int) -> int:
        given = self.first_sentinel_id
        return vocab_size + self.num_sentinels - 1 if given is None else given

    def special(self, tokenizer: TokenizerEntry) -> SpanTokens:
        """Return the ids beside the text.

        Raises:
            DataError: an end or a start is neither given nor the tokenizer's, or is a sentinel.
        """
        require_ends(self.document_mask, tokenizer)
        eot = tokenizer.eot_id
        eos = eot if self.eos_id is None else self.eos_id
        start = eot if self.start_id is None else self.start_id
        if eos is None or start is None:
            missing = [f"{n}_id" for n, value in (("eos", eos), ("start", start)) if value is None]
            raise DataError(
                f"data.objective.{missing[0]}: the tokenizer has no end-of-text token to take; "
                f"set {' and '.join(missing)}"
            )
        first = self._first_sentinel(tokenizer.vocab_size)
        for name, value in (("eos_id", eos), ("start_id", start)):
            if first - self.num_sentinels < value <= first:
                raise DataError(
                    f"data.objective.{name}: the id {value} is a sentinel "
                    f"({first - self.num_sentinels + 1}..{first}); set it to another"
                )
        return SpanTokens(eot, first, self.num_sentinels, eos, start)
