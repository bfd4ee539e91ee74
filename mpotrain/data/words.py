"""Where words begin, told from the pieces of a vocabulary.

A word is what stands between spaces, with the space before it; what follows a line end belongs to
the word that the line end begins. WordPiece and WordLevel have words of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mpotrain.errors import DataError

SPACE_MARK = "\u2581"
"""How sentencepiece writes a space inside its pieces; as text it is an ordinary character."""
_ASCII_SPACES = " \t\n\r\v\f"
_BYTE_LEVEL_SPACES = tuple(chr(0x100 + ord(space)) for space in _ASCII_SPACES)
"""How byte-level vocabularies write these bytes."""


def spaced_starts(pieces: Iterable[str]) -> list[bool]:
    """Return which pieces of a sentencepiece vocabulary begin a word.

    Args:
        pieces: the pieces; bytes are written `<0xNN>`.
    """
    byte_spaces = {f"<0x{ord(space):02X}>" for space in _ASCII_SPACES}
    return [
        piece in byte_spaces or piece[:1] == SPACE_MARK or piece[:1].isspace() for piece in pieces
    ]


def declared_starts(declaration: Mapping[str, Any], pieces: Iterable[str]) -> list[bool]:
    """Return which pieces of a `tokenizer.json` begin a word.

    Args:
        declaration: content of the file.
        pieces: pieces of its vocabulary.

    Raises:
        DataError: the pieces mark neither spaces nor that they go on.
    """
    pieces = list(pieces)
    model = declaration["model"]
    if model.get("type") == "WordLevel":
        return [True] * len(pieces)
    if model.get("type") == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        return [not piece.startswith(prefix) for piece in pieces]
    if any(_names(declaration.get(part), "ByteLevel") for part in ("pre_tokenizer", "decoder")):
        return [piece.startswith(_BYTE_LEVEL_SPACES) for piece in pieces]
    if any(piece.startswith(SPACE_MARK) for piece in pieces):
        return spaced_starts(pieces)
    raise DataError(
        "data.objective.whole_word: the pieces of this tokenizer do not show where words begin "
        "(no '##', no U+0120, no U+2581); set it to false"
    )


def _names(part: Any, kind: str) -> bool:
    """Return whether a step of a tokenizer, or one inside it, is of a kind."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_names(value, kind) for value in part.values())
    return isinstance(part, list) and any(_names(value, kind) for value in part)
