"""Ids with a meaning of their own, as each objective resolves them for a tokenizer (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from mpotrain.data.manifest import TokenizerEntry
from mpotrain.errors import DataError


@dataclass(frozen=True)
class CausalTokens:
    """Ids that next-token prediction knows.

    Attributes:
        eot: id that ends a document; None where the tokenizer has none.
    """

    eot: int | None


@dataclass(frozen=True)
class MaskedTokens:
    """Ids that masked prediction knows.

    Attributes:
        eot: id that ends a document; None where the tokenizer has none.
        mask: id that stands for a masked token.
        cls: id before every sequence.
        sep: id after every segment.
    """

    eot: int | None
    mask: int
    cls: int
    sep: int


@dataclass(frozen=True)
class SpanTokens:
    """Ids that span corruption knows.

    Attributes:
        eot: id that ends a document; None where the tokenizer has none.
        first_sentinel: id that stands for the first dropped span.
        num_sentinels: how many there are; sentinel k has id `first_sentinel` - k.
        eos: id that ends the sequences of encoder and decoder.
        start: first id that the decoder reads.
    """

    eot: int | None
    first_sentinel: int
    num_sentinels: int
    eos: int
    start: int


def require_ends(document_mask: bool, tokenizer: TokenizerEntry) -> None:
    """Refuse a document mask where nothing in the tokens says that a document ends.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """
    if document_mask and tokenizer.eot_id is None:
        raise DataError(
            "data.objective.document_mask: the tokenizer has no end-of-text token, so documents "
            "cannot be told apart; set it to false"
        )
