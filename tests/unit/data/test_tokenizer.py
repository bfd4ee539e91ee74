"""Tokenizers: every text comes back, control tokens are never read from text, digests tell."""

import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from mpotrain.data.config import SentencePieceConfig
from mpotrain.data.manifest import Manifest, write_manifest
from mpotrain.data.tokenizer import (
    HuggingFaceTokenizer,
    IdentityTokenizer,
    copy_tokenizer,
    load_tokenizer,
)
from mpotrain.data.tokenizer_training import (
    PASSAGE_CHARACTERS,
    passages,
    sample_documents,
    train_sentencepiece,
)
from mpotrain.errors import DataError

CORPUS = [
    f"def function_{i}(argument):\n\treturn argument + {i}\n\n\nThe quick brown fox number {i} "
    f"jumps.   Indented   text <s> </s> <unk> <0x41> \u2581 \u2585 na\u00efve caf\u00e9 \x00\n"
    for i in range(200)
]
LITERALS = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<pad>", "<0x41>", "a</s>b", "</s></s>"]
HARD = [
    "",
    " ",
    "  leading",
    "trailing  ",
    "a   b",
    "\n\n\n",
    "\t\tx\ty",
    "line\r\nline\rline",
    "\u2581",
    "a \u2581\u2581 b\u2581",
    "\u2585\u2047",
    "\x00\x01\x7f",
    "\ufeffx",
    "e\u0301 \u00e9 \ufb01 \uff21",
    "\u65e5\u672c\u8a9e \U0001f600",
    *LITERALS,
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    config = SentencePieceConfig(model_type=request.param, vocab_size=400)
    train_sentencepiece(CORPUS, config, path)
    return path


def train_huggingface(path, model, specials=("<|endoftext|>",)):
    kinds = {"bpe": (models.BPE(), trainers.BpeTrainer), "unigram": (models.Unigram(), None)}
    base, trainer = kinds[model]
    tokenizer = tokenizers.Tokenizer(base)
    if model == "bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    else:
        trainer, options = trainers.UnigramTrainer, {"unk_token": "<unk>"}
    tokenizer.train_from_iterator(
        CORPUS,
        trainer(vocab_size=400, special_tokens=list(specials), show_progress=False, **options),
    )
    tokenizer.enable_truncation(max_length=5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    return train_huggingface(tmp_path_factory.mktemp("hf") / "tokenizer.json", "bpe")


@pytest.mark.parametrize("text", HARD)
def test_sentencepiece_gives_hard_texts_back(trained, text):
    tokenizer = load_tokenizer(trained)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, tokenizer.eot_id} & set(ids)


@pytest.fixture(scope="module")
def loaded(trained):
    return load_tokenizer(trained)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("\u2581 \n<s>")))
)
def test_sentencepiece_gives_every_text_back(loaded, text):
    assert loaded.decode(loaded.encode(text)) == text


def test_the_space_mark_needs_our_care(trained):
    """Plain sentencepiece turns U+2581 into a space; this is what the byte pieces are for."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained))
    assert model.decode(model.encode("a\u2581b")) == "a b"
    assert load_tokenizer(trained).encode("plain text") == model.encode("plain text")


@pytest.mark.parametrize("text", HARD)
def test_huggingface_gives_hard_texts_back(huggingface, text):
    tokenizer = load_tokenizer(huggingface)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids


def test_huggingface_neither_cuts_nor_pads(huggingface):
    tokenizer = load_tokenizer(huggingface)
    text = "The quick brown fox jumps. " * 20
    assert len(tokenizer.encode(text)) > 20
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("special", [True, False])
def test_literal_eot_is_text_however_it_is_declared(huggingface, tmp_path, special):
    content = json.loads(huggingface.read_text())
    for token in content["added_tokens"]:
        token["special"] = special
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    plain = tokenizers.Tokenizer.from_file(str(path))
    assert plain.token_to_id("<|endoftext|>") in plain.encode("a<|endoftext|>b").ids
    tokenizer = HuggingFaceTokenizer(path)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_a_tokenizer_that_cannot_tell_text_from_control_is_refused(tmp_path):
    path = train_huggingface(tmp_path / "tokenizer.json", "unigram", ("<unk>", "</s>"))
    with pytest.raises(DataError, match="literal text"):
        load_tokenizer(path)


def test_missing_eot_is_reported(tmp_path, trained):
    path = train_huggingface(tmp_path / "tokenizer.json", "bpe", ("<|stop|>",))
    with pytest.raises(DataError, match=r"name the token.*<\|stop\|>"):
        load_tokenizer(path)
    assert load_tokenizer(path, eot="<|stop|>").eot_id == 0
    with pytest.raises(DataError, match="control piece 'fox'"):
        load_tokenizer(trained, eot="fox")


def test_damaged_files_are_refused(tmp_path):
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(DataError, match=name):
            load_tokenizer(tmp_path / name)
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "missing.model")


def test_ids_outside_the_vocabulary_are_refused(trained, huggingface):
    for tokenizer in (load_tokenizer(trained), load_tokenizer(huggingface), IdentityTokenizer(9)):
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(DataError, match="outside the vocabulary"):
                tokenizer.decode([0, bad])


def test_control_tokens_have_no_text(trained, huggingface):
    for tokenizer in (load_tokenizer(trained), load_tokenizer(huggingface)):
        ids = tokenizer.encode("fox")
        assert tokenizer.decode([*ids, tokenizer.eot_id, *ids]) == "foxfox"


def test_training_is_repeatable_and_quiet(tmp_path, capfd):
    config = SentencePieceConfig(vocab_size=380)
    for name in ("a", "b"):
        train_sentencepiece(iter(CORPUS), config, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert capfd.readouterr() == ("", "")


def test_vocabulary_has_the_size_asked_for(trained):
    assert load_tokenizer(trained).vocab_size == 400


def test_impossible_vocabularies_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"vocabulary of 9000 .*Vocabulary size too high"):
        train_sentencepiece(CORPUS, SentencePieceConfig(vocab_size=9000), tmp_path / "m")
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", " "], SentencePieceConfig(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_sample_is_bounded_uniform_and_repeatable():
    texts = [f"{i:06d}" + "x" * 94 for i in range(2000)]
    sample = sample_documents(iter(texts), 20_000)
    assert sum(map(len, sample)) <= 20_000
    assert len(sample) == 200
    assert sample == sorted(sample)
    assert sample == sample_documents(texts, 20_000)
    # Uniform: the mean position of 200 out of 2000 lies within 4 standard errors of the middle.
    mean = sum(int(text[:6]) for text in sample) / 200
    assert abs(mean - 999.5) < 4 * 577 / 200**0.5
    assert sample_documents(texts, 10**9) == texts


def test_one_long_document_is_cut_at_a_character():
    assert sample_documents(["\u00e9" * 10], 5) == ["\u00e9\u00e9"]


def test_passages_keep_the_text():
    text = "".join(f"line {i}\n" for i in range(1000)) + "y" * 5000
    parts = list(passages(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= PASSAGE_CHARACTERS
    assert parts[0].endswith("\n")


def test_identity_reads_and_writes_numbers():
    tokenizer = IdentityTokenizer(20)
    assert tokenizer.encode("3 14\n15") == [3, 14, 15]
    assert tokenizer.decode([3, 14]) == "3 14"
    with pytest.raises(DataError, match="token ids, not text"):
        tokenizer.encode("three")
    with pytest.raises(DataError, match="outside"):
        tokenizer.encode("20")


def folder_with(path, folder, eot=None):
    folder.mkdir()
    tokenizer = load_tokenizer(path, eot=eot)
    copy = copy_tokenizer(path, folder)
    entry = tokenizer.entry(copy.name)
    manifest = Manifest(dtype="uint16", tokenizer=entry, shards=(), settings_digest="x")
    write_manifest(folder, manifest)
    return tokenizer, copy


def test_prepared_folder_knows_its_tokenizer(trained, huggingface, tmp_path):
    for number, (path, eot) in enumerate([(trained, None), (trained, "<s>"), (huggingface, None)]):
        original, _ = folder_with(path, tmp_path / str(number), eot)
        loaded = load_tokenizer(tmp_path / str(number))
        assert loaded.digest == original.digest
        assert loaded.eot_id == original.eot_id
        assert loaded.encode(CORPUS[0]) == original.encode(CORPUS[0])


def test_exchanged_tokenizer_is_refused(trained, tmp_path):
    """Larger, smaller, and of the same size with two pieces exchanged."""
    _, copy = folder_with(trained, tmp_path / "f")
    for size in (390, 410):
        train_sentencepiece(CORPUS, SentencePieceConfig(vocab_size=size), copy)
        with pytest.raises(DataError, match="is not the tokenizer"):
            load_tokenizer(tmp_path / "f")
    train_sentencepiece(reversed(CORPUS[:150]), SentencePieceConfig(vocab_size=400), copy)
    assert load_tokenizer(copy).vocab_size == load_tokenizer(trained).vocab_size
    with pytest.raises(DataError, match="is not the tokenizer"):
        load_tokenizer(tmp_path / "f")


def test_digest_depends_on_the_end_of_text(trained):
    assert load_tokenizer(trained).digest != load_tokenizer(trained, eot="<s>").digest
