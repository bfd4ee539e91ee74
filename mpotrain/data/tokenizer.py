"""Tokenizers: sentencepiece models, Hugging Face `tokenizer.json`, and token ids themselves.

Whatever stands in a text is text. A control token is never read from it: a document that quotes
`</s>` or `<|endoftext|>` does not end there.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers

from mpotrain.data.manifest import (
    MANIFEST_NAME,
    TokenizerEntry,
    file_digest,
    read_manifest,
    tokenizer_digest,
)
from mpotrain.data.words import SPACE_MARK, declared_starts, spaced_starts
from mpotrain.durable import write_durably
from mpotrain.errors import DataError

USUAL_EOT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""Names under which published tokenizers keep their end-of-text token, in order of preference."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: `sentencepiece`, `huggingface` or `identity`.
        vocab_size: all ids lie below it.
        eot_id: id that ends a document, or None.
        digest: equal digests mean equal tokens for every text.
    """

    kind: str
    vocab_size: int
    eot_id: int | None
    digest: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without an end-of-text token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control tokens have none.

        Raises:
            DataError: an id lies outside the vocabulary.
        """

    @abstractmethod
    def word_starts(self) -> npt.NDArray[np.bool_]:
        """Return which ids begin a word: bool (vocab_size,).

        A word is what stands between spaces, with the space before it, or what the tokenizer
        itself takes for one (WordPiece: punctuation is a word of its own).

        Raises:
            DataError: the pieces do not say where words begin.
        """

    def entry(self, file: str | None) -> TokenizerEntry:
        """Describe the tokenizer for a manifest that keeps it under the name `file`."""
        return TokenizerEntry(
            kind=self.kind,
            file=file,
            digest=self.digest,
            vocab_size=self.vocab_size,
            eot_id=self.eot_id,
        )

    def _check(self, ids: Sequence[int]) -> list[int]:
        plain = [int(token) for token in ids]
        for token in plain:
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"token id {token} lies outside the vocabulary 0..{self.vocab_size - 1}"
                )
        return plain


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` (unigram or bpe).

    Args:
        path: the model file.
        eot: name of the piece that ends a document; default: the model's own end of sentence.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, eot: str | None = None) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, TypeError) as error:
            raise DataError(f"{path} is not a sentencepiece model: {error}") from error
        self.vocab_size = int(self._model.get_piece_size())
        self.eot_id = self._find_eot(path, eot)
        self.digest = tokenizer_digest(self.kind, file_digest(path), self.vocab_size, self.eot_id)
        self._mark = self._mark_bytes()

    def _find_eot(self, path: Path, eot: str | None) -> int:
        token = int(self._model.eos_id() if eot is None else self._model.piece_to_id(eot))
        if token < 0 or not self._model.is_control(token):
            name = "an end-of-sentence piece" if eot is None else f"a control piece {eot!r}"
            raise DataError(f"{path} has no {name}; name its end-of-text piece with `eot`")
        return token

    def _mark_bytes(self) -> list[int] | None:
        """Return the byte pieces of U+2581, where the text may be cut around it.

        sentencepiece itself turns the character into a space. Cutting is exact only in models
        with byte pieces that put no space before a text.
        """
        pieces = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        first = self._model.encode("a", out_type=str)[:1]
        if not all(self._model.is_byte(piece) for piece in pieces):
            return None
        return None if first and first[0].startswith(SPACE_MARK) else pieces

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without an end-of-text token."""
        if self._mark is None or SPACE_MARK not in text:
            return list(self._model.encode(text))
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_MARK)):
            ids += self._mark if number else []
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control tokens have none."""
        return str(self._model.decode(self._check(ids)))

    def word_starts(self) -> npt.NDArray[np.bool_]:
        """Return which ids begin a word: bool (vocab_size,)."""
        pieces = [str(self._model.id_to_piece(token)) for token in range(self.vocab_size)]
        return np.array(spaced_starts(pieces), dtype=np.bool_)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face tokenizers library.

    Args:
        path: the file.
        eot: name of the token that ends a document; default: one of `USUAL_EOT`.
    """

    kind = "huggingface"

    def __init__(self, path: Path, eot: str | None = None) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            added = {str(token["content"]): token for token in content["added_tokens"]}
            eot = self._find_eot(path, added, eot)
            # The end of a document is never text, however the file declares it.
            added[eot]["special"] = True
            self._model = tokenizers.Tokenizer.from_str(json.dumps(content))
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception for a bad file
            raise DataError(f"{path} is not a tokenizer.json: {error}") from error
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.eot_id = int(added[eot]["id"])
        self._check_literals(path, added)
        self.digest = tokenizer_digest(self.kind, file_digest(path), self.vocab_size, self.eot_id)

    @staticmethod
    def _find_eot(path: Path, added: Iterable[str], eot: str | None) -> str:
        names = USUAL_EOT if eot is None else (eot,)
        for name in names:
            if name in added:
                return name
        raise DataError(
            f"{path} has no added token {' or '.join(names)}; name the token that ends a document "
            f"with `eot` (it has: {', '.join(sorted(added)) or 'none'})"
        )

    def _check_literals(self, path: Path, added: dict[str, dict[str, object]]) -> None:
        for name, token in added.items():
            if token.get("special") and token["id"] in self.encode(name):
                raise DataError(
                    f"{path} encodes the literal text {name!r} as its control token, so a document "
                    "that quotes it would be torn; such a tokenizer cannot be used"
                )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without an end-of-text token."""
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control tokens have none."""
        return str(self._model.decode(self._check(ids), skip_special_tokens=True))

    def word_starts(self) -> npt.NDArray[np.bool_]:
        """Return which ids begin a word: bool (vocab_size,).

        Raises:
            DataError: the vocabulary does not show where words begin.
        """
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        starts = np.zeros(self.vocab_size, dtype=np.bool_)
        begins = declared_starts(json.loads(self._model.to_str()), vocabulary)
        starts[list(vocabulary.values())] = begins
        return starts


class IdentityTokenizer(Tokenizer):
    """For sources that are token ids already: a text is decimal ids with spaces between.

    Args:
        vocab_size: all ids lie below it.
        eot_id: id that ends a document, or None.
    """

    kind = "identity"

    def __init__(self, vocab_size: int, eot_id: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.eot_id = eot_id
        self.digest = tokenizer_digest(self.kind, "", vocab_size, eot_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids that the text spells as decimal numbers.

        Raises:
            DataError: a word is no id of the vocabulary.
        """
        words = text.split()
        if not all(word.isascii() and word.isdigit() for word in words):
            raise DataError("this data is token ids, not text: write ids, for example `3 14 15`")
        return self._check([int(word) for word in words])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids as decimal numbers with spaces between."""
        return " ".join(str(token) for token in self._check(ids))

    def word_starts(self) -> npt.NDArray[np.bool_]:
        """Refuse: ids that are their own text have no words.

        Raises:
            DataError: always.
        """
        raise DataError(
            "data.objective.whole_word: the data are token ids that no tokenizer made, so it is "
            "not known where words begin; set it to false"
        )


def load_tokenizer(path: str | Path, *, eot: str | None = None) -> Tokenizer:
    """Load a tokenizer from its file or from a prepared folder.

    Args:
        path: a sentencepiece `.model`, a `tokenizer.json`, or a folder with a manifest.
        eot: name of the token that ends a document (a folder's manifest names its own).

    Returns:
        The tokenizer.

    Raises:
        DataError: missing or damaged file, no end-of-text token, or a file that no longer is the
            one that the folder was prepared with.
    """
    path = Path(path)
    if path.is_dir():
        return _load_from_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file or prepared folder")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eot)
    return SentencePieceTokenizer(path, eot)


def _load_from_folder(folder: Path) -> Tokenizer:
    entry = read_manifest(folder).tokenizer
    if entry.file is None:
        return IdentityTokenizer(entry.vocab_size, entry.eot_id)
    path = folder / entry.file
    content = file_digest(path)
    if tokenizer_digest(entry.kind, content, entry.vocab_size, entry.eot_id) != entry.digest:
        raise DataError(
            f"{path} is not the tokenizer that {folder / MANIFEST_NAME} was written with; "
            "restore it or prepare the folder again"
        )
    return open_tokenizer(path, entry.eot_id)


def open_tokenizer(path: Path, eot_id: int | None) -> Tokenizer:
    """Load a tokenizer file whose end-of-text token is known by its id.

    Args:
        path: a `.model` or `tokenizer.json` file.
        eot_id: id of the token that ends a document.

    Raises:
        DataError: the file is damaged or has no such token.
    """
    if path.suffix == ".json":
        try:
            added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
            name = next(str(token["content"]) for token in added if token["id"] == eot_id)
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise DataError(f"{path} has no added token with id {eot_id}") from error
        return HuggingFaceTokenizer(path, name)
    tokenizer = SentencePieceTokenizer(path)
    if tokenizer.eot_id == eot_id:
        return tokenizer
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    if eot_id is None or not 0 <= eot_id < tokenizer.vocab_size:
        raise DataError(f"{path} has no piece with id {eot_id}")
    return SentencePieceTokenizer(path, str(model.id_to_piece(eot_id)))


def copy_tokenizer(source: str | Path, folder: Path) -> Path:
    """Copy a tokenizer's file into a folder, durably, under its standard name.

    Args:
        source: a `.model` or `tokenizer.json` file, or a prepared folder.
        folder: where to.

    Returns:
        The copy: `tokenizer.model` or `tokenizer.json`.

    Raises:
        DataError: there is no such file.
        StorageError: writing failed.
    """
    source = tokenizer_file(source)
    target = folder / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model")
    try:
        content = source.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {source}: {error.strerror}") from error
    write_durably(target, content)
    return target


def tokenizer_file(source: str | Path) -> Path:
    """Return the tokenizer file that a path names: itself, or the one of a prepared folder.

    Raises:
        DataError: the folder holds token ids without a tokenizer.
    """
    source = Path(source)
    if not source.is_dir():
        return source
    entry = read_manifest(source).tokenizer
    if entry.file is None:
        raise DataError(f"{source} holds token ids that no tokenizer made; name another tokenizer")
    return source / entry.file
