"""Configuration of masked prediction and of sentence order (no torch)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.special_ids import MaskedTokens, require_ends
from mpotrain.data.window import Window, rate_problems
from mpotrain.errors import DataError
from mpotrain.sample import SampleLengths
from mpotrain.schema import collect_problems, config


@config
class MaskedConfig:
    """Predict masked tokens (BERT), and which of two segments came first (ALBERT).

    A row is [CLS] A [SEP] B [SEP]; a window in which a document ends becomes several of these, one
    after another in one row. Ids that are not given are appended behind the tokenizer's: mask, cls
    and sep at vocab_size + 0, 1 and 2.
    """

    kind: Literal["masked"] = "masked"
    """Tag of this variant."""
    rate: float = 0.15
    """Share of the tokens of a row that are predicted."""
    mask_share: float = 0.8
    """Share of the predicted tokens that are replaced by the mask."""
    random_share: float = 0.1
    """Share of the predicted tokens that are replaced by a random token; the rest stays."""
    whole_word: bool = False
    """Choose whole words instead of single tokens."""
    pairs: bool = True
    """Cut every text in two segments and predict whether they were swapped."""
    min_segment: int = 8
    """Fewest tokens of a segment; texts shorter than two of these stay uncut, without a label."""
    document_mask: bool = True
    """Tokens see their own document alone, and positions begin anew with each document."""
    mask_id: int | None = None
    """Id of the mask in a vocabulary that has one."""
    cls_id: int | None = None
    """Id before every sequence in a vocabulary that has one."""
    sep_id: int | None = None
    """Id after every segment in a vocabulary that has one."""

    SPECIALS: ClassVar = ("mask_id", "cls_id", "sep_id")

    def problems(self, where: str, sequence_length: int | None) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key.

        Args:
            where: dotted key of this section.
            sequence_length: tokens of a sample; None where it cannot be read.
        """
        return collect_problems(
            lambda: rate_problems(where, self.rate),
            *(partial(self._share_problems, where, key) for key in ("mask_share", "random_share")),
            lambda: self._sum_problems(f"{where}.random_share"),
            lambda: self._length_problems(where, sequence_length),
            *(partial(self._sign_problems, where, key) for key in self.SPECIALS),
            lambda: self._twice_problems(where),
        )

    def _share_problems(self, where: str, key: str) -> list[str]:
        share = getattr(self, key)
        return [] if 0 <= share <= 1 else [f"{where}.{key}: is {share} but must lie in 0..1"]

    def _sum_problems(self, where: str) -> list[str]:
        shares = (self.mask_share, self.random_share)
        # Fractions such as 0.7 + 0.3 must not fail by their last bit.
        if not all(0 <= share <= 1 for share in shares) or sum(shares) <= 1 + 1e-9:
            return []
        return [
            f"{where}: is {self.random_share}, which with mask_share {self.mask_share} makes more "
            "than 1"
        ]

    def _length_problems(self, where: str, sequence_length: int | None) -> list[str]:
        if self.min_segment < 1:
            return [f"{where}.min_segment: is {self.min_segment} but must be at least 1"]
        text = 2 * self.min_segment if self.pairs else 1
        needed = text + self._num_marks
        if sequence_length is None or sequence_length >= needed:
            return []
        what = f"two segments of {self.min_segment} tokens" if self.pairs else "one token"
        return [
            f"{where}: {what} and their marks need a sequence_length of {needed}, "
            f"but it is {sequence_length}"
        ]

    def _sign_problems(self, where: str, key: str) -> list[str]:
        value = getattr(self, key)
        return [f"{where}.{key}: is {value} but ids begin at 0"] if (value or 0) < 0 else []

    def _twice_problems(self, where: str) -> list[str]:
        given = {key: getattr(self, key) for key in self.SPECIALS}
        given = {key: value for key, value in given.items() if value is not None}
        values = list(given.values())
        return [
            f"{where}.{key}: is {value}, and so is another of {', '.join(self.SPECIALS)}"
            for index, (key, value) in enumerate(given.items())
            if value in values[:index]
        ]

    @property
    def _num_marks(self) -> int:
        return 3 if self.pairs else 2

    def window(self, sequence_length: int) -> Window:
        """Return what one sample takes: what a row holds beside the marks of one sequence."""
        return Window(sequence_length - self._num_marks)

    def lengths(self, sequence_length: int) -> SampleLengths:
        """Return the lengths of one sample inside a document."""
        predicted = max(1, round(self.rate * (sequence_length - self._num_marks)))
        return SampleLengths(sequence_length, sequence_length, predicted, int(self.pairs))

    def vocab_size(self, tokenizer_vocab_size: int) -> int:
        """Return how many ids a model needs for the tokens and the objective's own ids."""
        return max(tokenizer_vocab_size, 1 + max(self._ids(tokenizer_vocab_size)))

    def _ids(self, vocab_size: int) -> tuple[int, int, int]:
        mask, cls, sep = (
            vocab_size + offset if given is None else given
            for offset, given in enumerate((self.mask_id, self.cls_id, self.sep_id))
        )
        return mask, cls, sep

    def special(self, tokenizer: TokenizerEntry) -> MaskedTokens:
        """Return the ids beside the text.

        Raises:
            DataError: documents or words are to be told apart and the tokenizer knows none, or two
                of the ids are the same.
        """
        require_ends(self.document_mask, tokenizer)
        if self.whole_word and tokenizer.kind == "identity":
            raise DataError(
                "data.objective.whole_word: the data are token ids that no tokenizer made, so it "
                "is not known where words begin; set it to false"
            )
        mask, cls, sep = self._ids(tokenizer.vocab_size)
        if len({mask, cls, sep}) < 3:
            raise DataError(
                f"data.objective: mask, cls and sep have the ids {mask}, {cls} and {sep} with this "
                f"tokenizer of {tokenizer.vocab_size} ids; give mask_id, cls_id and sep_id three "
                "different ids"
            )
        return MaskedTokens(tokenizer.eot_id, mask, cls, sep)
