"""Do the data of a run speak the language of a model that is taken over?"""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
import tokenizers

from mpotrain.convert.source import Source
from mpotrain.data.dataset import BlendedDataset
from mpotrain.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
"""Files that hold the vocabulary of a Hugging Face model, the most telling first."""


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder that hold a vocabulary."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def tokenizer_problem(source: Source, dataset: BlendedDataset) -> str | None:
    """Say why data do not go with a model, None where they do or nothing is known.

    Args:
        source: the trained model.
        dataset: data of the run that takes it over.
    """
    entry, theirs = dataset.tokenizer, dataset.tokenizer_path
    if source.tokenizer_digest is not None:
        if entry.digest == source.tokenizer_digest:
            return None
        return (
            f"data.sources: their tokenizer ({entry.kind}, {entry.vocab_size:,} pieces) is not the "
            f"one of {source.origin}; its weights know other tokens. Prepare the data with that "
            "tokenizer (`mpotrain prepare --tokenizer`, the file lies in the source's run folder)"
        )
    if not source.tokenizer_files or theirs is None:
        return None
    # Two forms of one vocabulary may differ by reserved ids: the like is compared with the like.
    file = next((f for f in source.tokenizer_files if f.suffix == theirs.suffix), None)
    file = file or source.tokenizer_files[0]
    if vocabulary(theirs) == vocabulary(file):
        return None
    usable = [
        f for f in source.tokenizer_files if f.name == "tokenizer.json" or f.suffix == ".model"
    ]
    advice = usable[0] if usable else file.with_name("tokenizer.json")
    return (
        f"data.sources: their tokenizer {theirs} has another vocabulary than {file}; prepare the "
        f"data with `mpotrain prepare --tokenizer {advice}`"
    )


def vocabulary(path: Path) -> dict[str, int]:
    """Return the pieces of a tokenizer file with their ids.

    Args:
        path: one of `TOKENIZER_FILES`, or a sentencepiece model of any name.

    Raises:
        CheckpointError: the file is none of these.
    """
    try:
        if path.suffix == ".model":
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            return {str(model.id_to_piece(n)): n for n in range(model.get_piece_size())}
        if path.name == "vocab.json":
            return {str(k): int(v) for k, v in json.loads(path.read_text("utf-8")).items()}
        if path.suffix == ".txt":
            lines = path.read_text("utf-8").splitlines()
            return {piece: number for number, piece in enumerate(lines)}
        return dict(tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True))
    except Exception as error:  # the libraries raise bare Exception for a bad file
        raise CheckpointError(f"{path} is no vocabulary: {error}") from error
