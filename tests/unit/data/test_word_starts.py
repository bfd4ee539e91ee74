"""Where words begin: the words of a text, told from its pieces alone."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import tokenizers
from prepared_folder import write_folder
from tokenizers import decoders, models, pre_tokenizers, trainers

from mpotrain.data.config import DataConfig, SentencePieceConfig, SourceConfig
from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.loader import Loader
from mpotrain.data.manifest import read_manifest, write_manifest
from mpotrain.data.masked_config import MaskedConfig
from mpotrain.data.objective import open_objective
from mpotrain.data.tokenizer import IdentityTokenizer, copy_tokenizer, load_tokenizer
from mpotrain.data.tokenizer_training import train_sentencepiece
from mpotrain.errors import DataError

CORPUS = [
    f"def function_{i}(argument):\n\treturn argument + {i}\nThe quick brown fox number {i} jumps, "
    f"na\u00efve caf\u00e9 unhappiness remarkable  two spaces\n"
    for i in range(200)
]
TEXT = "The quick\u00a0brown fox,  unremarkably \u65e5\u672c na\u00efve\n\n\treturn z\u2581q !"


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def spaced(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    train_sentencepiece(CORPUS, SentencePieceConfig(model_type=request.param, vocab_size=420), path)
    return path


def save(path, model, trainer, pre_tokenizer, decoder):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    # What is unknown is no control token: the text "[UNK]" itself is unknown to some of these.
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "[UNK]"]
    path.write_text(json.dumps(content))
    return path


def trained(path, kind):
    special = {"special_tokens": ["[UNK]", "<|endoftext|>"], "show_progress": False}
    if kind == "byte-level":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, **special)
        step = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
        return save(path, models.BPE(), trainer, step, decoders.ByteLevel())
    if kind == "metaspace":
        trainer = trainers.BpeTrainer(vocab_size=300, **special)
        step = pre_tokenizers.Metaspace(prepend_scheme="never")
        return save(path, models.BPE(unk_token="[UNK]"), trainer, step, decoders.Metaspace())
    if kind == "wordpiece":
        trainer = trainers.WordPieceTrainer(vocab_size=150, **special)
        step = pre_tokenizers.BertPreTokenizer()
        return save(path, models.WordPiece(unk_token="[UNK]"), trainer, step, decoders.WordPiece())
    if kind == "wordlevel":
        trainer = trainers.WordLevelTrainer(**special)
        return save(
            path, models.WordLevel(unk_token="[UNK]"), trainer, pre_tokenizers.Whitespace(), None
        )
    trainer = trainers.BpeTrainer(vocab_size=200, **special)
    return save(path, models.BPE(unk_token="[UNK]"), trainer, pre_tokenizers.Whitespace(), None)


def words_of(tokenizer, text: str) -> list[str]:
    """The text of each word that the flags cut, joined again by the tokenizer."""
    starts = tokenizer.word_starts()
    assert starts.shape == (tokenizer.vocab_size,)
    words: list[list[int]] = []
    for token in tokenizer.encode(text):
        if starts[token] or not words:
            words.append([])
        words[-1].append(token)
    return [tokenizer.decode(word) for word in words]


def spaced_words(text: str) -> list[str]:
    """What begins with a space and holds no further one: every space begins a word."""
    return re.findall(r"^[^ \n\t]+|[ \n\t][^ \n\t]*", text)


def joined_runs(words: list[str]) -> list[str]:
    """Words with the spaces before them, several spaces together."""
    found: list[str] = []
    for word in words:
        if found and not found[-1].strip():
            found[-1] += word
        else:
            found.append(word)
    return found


def test_words_of_sentencepiece_are_what_stands_between_spaces(spaced):
    words = words_of(load_tokenizer(spaced), TEXT)
    assert "".join(words) == TEXT
    assert joined_runs(words) == joined_runs(spaced_words(TEXT))
    # A literal U+2581 is no space, however the pieces spell it.
    assert words[-2].strip() == "z\u2581q"


def test_spaces_that_are_written_as_bytes_begin_words_too(spaced):
    tokenizer = load_tokenizer(spaced)
    ids = tokenizer.encode("quick\x0bfox\x00es")
    assert len(ids) > len(tokenizer.encode("quickfox"))
    assert words_of(tokenizer, "quick\x0bfox\x00es") == ["quick", "\x0bfox\x00es"]


def test_words_of_byte_level_vocabularies(tmp_path):
    tokenizer = load_tokenizer(trained(tmp_path / "tokenizer.json", "byte-level"))
    # A comma, which this tokenizer sets apart, belongs to the word before it.
    text = "The quick fox,  unremarkably na\u00efve\n\treturn z"
    words = words_of(tokenizer, text)
    assert joined_runs(words) == joined_runs(spaced_words(text))


def test_words_of_metaspace_vocabularies(tmp_path):
    tokenizer = load_tokenizer(trained(tmp_path / "tokenizer.json", "metaspace"))
    expected = ["The", "quick", "brown", "unhappiness", "remarkable"]
    words = words_of(tokenizer, " ".join(expected))
    assert [word.strip() for word in words] == expected


def test_wordpiece_marks_what_goes_on(tmp_path):
    path = trained(tmp_path / "tokenizer.json", "wordpiece")
    tokenizer = load_tokenizer(path)
    assert len(tokenizer.encode("remarkableness")) > 1
    # Its own words: punctuation is one.
    expected = ["The", "quick", "fox", ",", "remarkableness"]
    assert words_of(tokenizer, "The quick fox, remarkableness") == expected
    pieces = json.loads(path.read_text())["model"]["vocab"]
    starts = tokenizer.word_starts()
    assert all(bool(starts[token]) != piece.startswith("##") for piece, token in pieces.items())


def test_wordlevel_knows_whole_words_alone(tmp_path):
    assert load_tokenizer(trained(tmp_path / "tokenizer.json", "wordlevel")).word_starts().all()


def test_vocabularies_that_do_not_tell_are_refused(tmp_path):
    tokenizer = load_tokenizer(trained(tmp_path / "tokenizer.json", "unmarked"))
    with pytest.raises(DataError, match=r"data\.objective\.whole_word"):
        tokenizer.word_starts()
    with pytest.raises(DataError, match=r"data\.objective\.whole_word"):
        IdentityTokenizer(9, 1).word_starts()


def test_whole_words_of_real_text_are_masked_together(spaced, tmp_path):
    tokenizer = load_tokenizer(spaced)
    documents = [[*tokenizer.encode(text), tokenizer.eot_id] for text in CORPUS]
    folder = write_folder(tmp_path / "data", documents, vocab_size=tokenizer.vocab_size)
    entry = tokenizer.entry(copy_tokenizer(spaced, folder).name)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), tokenizer=entry))
    data = DataConfig(
        sources=(SourceConfig(path=str(folder)),),
        sequence_length=128,
        split=(1.0, 0.0, 0.0),
        objective=MaskedConfig(whole_word=True, pairs=False, rate=0.3),
    )
    dataset = BlendedDataset(data, "train")
    loader = Loader(
        dataset,
        global_batch_size=8,
        micro_batch_size=8,
        objective=open_objective(dataset),
        prefetch=False,
    )
    (batch,) = loader.microbatches(0)
    starts = tokenizer.word_starts()
    parts = 0
    for row in range(8):
        for place in range(1, 128):
            before, token = batch.targets[row, place - 1 : place + 1].tolist()
            inside = max(before, token) < tokenizer.vocab_size and batch.document_ids[row, place]
            if inside and not starts[token]:
                assert batch.loss_mask[row, place] == batch.loss_mask[row, place - 1]
                parts += int(batch.loss_mask[row, place])
    assert parts > 8
