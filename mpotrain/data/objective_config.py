"""What a run predicts of its text: the next token, masked tokens, or dropped spans (no torch).

Every objective says how many tokens of the stream one sample takes, how long the sequences are
that a network sees of it, and which ids it needs beside those of the tokenizer.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.masked_config import MaskedConfig
from mpotrain.data.span_config import SpanCorruptionConfig
from mpotrain.data.special_ids import CausalTokens, require_ends
from mpotrain.data.window import Window
from mpotrain.sample import SampleLengths, causal_lengths
from mpotrain.schema import config

__all__ = ["CausalConfig", "MaskedConfig", "ObjectiveConfig", "SpanCorruptionConfig"]


@config
class CausalConfig:
    """Predict the next token at every position."""

    kind: Literal["causal"] = "causal"
    """Tag of this variant."""
    document_mask: bool = False
    """Tokens see their own document alone, and positions begin anew with each document."""

    def problems(self, where: str, sequence_length: int | None) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key.

        Args:
            where: dotted key of this section.
            sequence_length: tokens of a sample; None where it cannot be read.
        """
        del where, sequence_length
        return []

    def window(self, sequence_length: int) -> Window:
        """Return what one sample takes: T tokens, and one more for the last target."""
        return Window(sequence_length, overlap=1)

    def lengths(self, sequence_length: int) -> SampleLengths:
        """Return the lengths of one sample."""
        return causal_lengths(sequence_length)

    def vocab_size(self, tokenizer_vocab_size: int) -> int:
        """Return how many ids a model needs for the tokens and the objective's own ids."""
        return tokenizer_vocab_size

    def special(self, tokenizer: TokenizerEntry) -> CausalTokens:
        """Return the ids beside the text.

        Raises:
            DataError: documents are to be told apart and the tokenizer ends none.
        """
        require_ends(self.document_mask, tokenizer)
        return CausalTokens(tokenizer.eot_id)


ObjectiveConfig = Annotated[
    CausalConfig | MaskedConfig | SpanCorruptionConfig, Field(discriminator="kind")
]
"""What a run predicts (union tagged by `kind`)."""
