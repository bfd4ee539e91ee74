"""`prepare`: what comes out is what went in, whatever the number of processes."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from mpotrain.data.config import ExistingTokenizerConfig, PrepareConfig, SentencePieceConfig
from mpotrain.data.indexed import IndexedReader
from mpotrain.data.manifest import check_files, read_manifest
from mpotrain.data.prepare import prepare
from mpotrain.data.progress import PrepareProgress
from mpotrain.data.tokenizer import load_tokenizer
from mpotrain.errors import ConfigError, DataError

TEXTS = [
    f"Document {i}: the quick <s> brown </s> fox\n\tjumps {i * i} times. \u2581 na\u00efve\n"
    * (i % 5 + 1)
    for i in range(57)
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    # Three documents without text, one of them at the end of a shard.
    texts = [*TEXTS[:10], "", *TEXTS[10:30], " \n\t", *TEXTS[30:], ""]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def settings(corpus, out, **changes):
    values = {
        "sources": (str(corpus),),
        "out": str(out),
        "tokenizer": SentencePieceConfig(vocab_size=340),
        "documents_per_shard": 10,
        "num_workers": 0,
    }
    return PrepareConfig(**{**values, **changes})


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(folder):
    for shard in read_manifest(folder).shards:
        reader = IndexedReader(folder / shard.name)
        yield from (reader[i].tolist() for i in range(len(reader)))


def test_every_document_comes_back_in_order(corpus, tmp_path):
    manifest = prepare(settings(corpus, tmp_path / "out"))
    assert manifest == read_manifest(tmp_path / "out")
    check_files(tmp_path / "out", manifest, verify=True)
    tokenizer = load_tokenizer(tmp_path / "out")
    found = list(documents(tmp_path / "out"))
    assert all(ids[-1] == tokenizer.eot_id and tokenizer.eot_id not in ids[:-1] for ids in found)
    assert [tokenizer.decode(ids) for ids in found] == TEXTS
    assert manifest.num_empty_documents == 3
    assert [shard.num_documents for shard in manifest.shards] == [10] * 5 + [7]


def test_counts_and_byte_lengths_are_exact(corpus, tmp_path):
    manifest = prepare(settings(corpus, tmp_path / "out"))
    sizes = [len(text.encode()) for text in TEXTS]
    stored = [
        np.load(tmp_path / "out" / f"{shard.name}.bytes.npy", allow_pickle=False)
        for shard in manifest.shards
    ]
    assert np.concatenate(stored).tolist() == sizes
    assert manifest.num_bytes == sum(sizes)
    assert manifest.num_tokens == sum(map(len, documents(tmp_path / "out")))
    assert manifest.num_documents == len(TEXTS)


def test_processes_change_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("mpotrain.data.feed.PARCEL_BYTES", 300)  # many parcels for few documents
    for workers in (0, 2):
        prepare(settings(corpus, tmp_path / str(workers), num_workers=workers))
    assert content(tmp_path / "0") == content(tmp_path / "2")


def test_parcels_change_nothing(corpus, tmp_path, monkeypatch):
    prepare(settings(corpus, tmp_path / "a"))
    monkeypatch.setattr("mpotrain.data.feed.PARCEL_BYTES", 1)
    prepare(settings(corpus, tmp_path / "b"))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_second_call_changes_nothing(corpus, tmp_path):
    out = tmp_path / "out"
    first = prepare(settings(corpus, out))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(settings(corpus, out, num_workers=3)) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"documents_per_shard": 11}, "documents_per_shard: 10 before, 11 now"),
        ({"max_bytes": 10**6}, "max_bytes: None before, 1000000 now"),
        (
            {"tokenizer": SentencePieceConfig(vocab_size=341)},
            r"tokenizer\.vocab_size: 340 before, 341 now",
        ),
        ({"text_column": "body"}, r"sources\[0\]\.text_column: text before, body now"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused_with_the_reason(corpus, tmp_path, changes, key, complete):
    out = tmp_path / "out"
    prepare(settings(corpus, out))
    if not complete:
        (out / "manifest.json").unlink()
    before = content(out)
    with pytest.raises(DataError, match=f"(?s)other settings.*{key}"):
        prepare(settings(corpus, out, **changes))
    assert content(out) == before


def test_changed_source_is_refused(corpus, tmp_path):
    prepare(settings(corpus, tmp_path / "out"))
    corpus.write_text(corpus.read_text().replace("quick", "slow!"))
    with pytest.raises(DataError, match=r"sources\[0\]\..*digest"):
        prepare(settings(corpus, tmp_path / "out"))


def test_damaged_shard_of_a_complete_folder_is_written_anew(corpus, tmp_path):
    out = tmp_path / "out"
    prepare(settings(corpus, out))
    whole = content(out)
    (out / "shard-00002.bin").write_bytes(b"torn")
    prepare(settings(corpus, out))
    assert content(out) == whole


def test_foreign_folder_is_left_alone(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"other files \(thesis\.tex\)"):
        prepare(settings(corpus, tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


def test_existing_tokenizer_and_folder_as_tokenizer(corpus, tmp_path):
    prepare(settings(corpus, tmp_path / "a"))
    for number, path in enumerate((tmp_path / "a" / "tokenizer.model", tmp_path / "a")):
        out = tmp_path / f"b{number}"
        manifest = prepare(settings(corpus, out, tokenizer=ExistingTokenizerConfig(path=str(path))))
        assert manifest.digest == read_manifest(tmp_path / "a").digest
        assert list(documents(out)) == list(documents(tmp_path / "a"))


def test_wide_vocabularies_use_wide_tokens(tmp_path):
    manifest = prepare(
        PrepareConfig(sources=("synthetic:positions",), out=str(tmp_path / "o"), num_documents=900)
    )
    assert manifest.tokenizer.vocab_size > 2**16
    assert manifest.dtype == "int32"
    tokens = [token for document in documents(tmp_path / "o") for token in document]
    assert tokens == list(range(manifest.num_tokens))


def test_markov_source_keeps_its_entropy_rate(tmp_path):
    config = PrepareConfig(
        sources=("synthetic:markov",),
        out=str(tmp_path / "o"),
        num_tokens=5000,
        documents_per_shard=2,
    )
    manifest = prepare(config)
    assert manifest.num_tokens == 5000
    assert manifest.num_bytes == 0
    assert manifest.tokenizer.kind == "identity"
    assert 0 < read_manifest(tmp_path / "o").extra["entropy_rate"] < np.log(16)
    assert load_tokenizer(tmp_path / "o").decode([1, 2]) == "1 2"
    assert prepare(config) == manifest


def test_stories_end_to_end(tmp_path):
    config = PrepareConfig(
        sources=("synthetic:stories",),
        out=str(tmp_path / "o"),
        num_documents=300,
        tokenizer=SentencePieceConfig(vocab_size=420, model_type="bpe"),
        num_workers=0,
    )
    manifest = prepare(config)
    assert manifest.num_documents == 300
    # Pieces, not bytes: the tokenizer was trained on these texts.
    assert manifest.num_bytes / manifest.num_tokens > 2


def test_nothing_to_prepare(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" \n")
    prepared = tmp_path / "o"
    with pytest.raises(DataError, match="no text to train"):
        prepare(settings(path, prepared))
    with pytest.raises(ConfigError, match=r"prepare\.documents_per_shard"):
        prepare(settings(path, prepared, documents_per_shard=0))


def test_only_empty_documents(corpus, tmp_path):
    prepare(settings(corpus, tmp_path / "a"))
    path = tmp_path / "a.txt"
    path.write_text(" \n")
    tokenizer = ExistingTokenizerConfig(path=str(tmp_path / "a"))
    with pytest.raises(DataError, match=r"no document with text.*1 empty"):
        prepare(settings(path, tmp_path / "o", tokenizer=tokenizer))
    assert not (tmp_path / "o" / "manifest.json").exists()


def test_lone_surrogates_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "good text " * 400 + '"}\n{"text": "bad \\ud800"}\n')
    tokenizer = SentencePieceConfig(vocab_size=300)
    with pytest.raises(DataError, match=r"document 1 .*character 4 is a lone surrogate"):
        prepare(settings(path, tmp_path / "o", tokenizer=tokenizer))


def test_progress_in_a_log_file_and_on_a_terminal():
    for terminal in (False, True):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=120)
        with PrepareProgress(enabled=True, total_bytes=100, console=console) as report:
            report.stage("tokenizing")
            report.advance(3, 100, 42)
        assert "3 documents" in stream.getvalue()
        assert "tokenizing" in stream.getvalue()


def test_progress_is_silent_unless_asked(corpus, tmp_path, capfd):
    prepare(settings(corpus, tmp_path / "out"))
    assert capfd.readouterr() == ("", "")
