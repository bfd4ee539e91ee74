"""Sources: every file kind gives the same documents; damage and mistakes are named."""

import bz2
import csv
import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from mpotrain.data import files
from mpotrain.data.config import PrepareConfig
from mpotrain.data.sources import documents_of, open_sources, token_kind
from mpotrain.errors import DataError

TEXTS = ["first\r\nline  two\n", "", '\u65e5\u672c, "quoted" <s>', "  third\t", "last"]


def read(*specs, **options):
    config = PrepareConfig(sources=tuple(map(str, specs)), out="unused", **options)
    return list(documents_of(open_sources(config), config.max_bytes))


def write_table(path, column="text"):
    lines = "\n".join(json.dumps({"id": i, column: text}) for i, text in enumerate(TEXTS))
    name = path.name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"id": range(5), column: TEXTS}), path)
    elif name.endswith((".csv", ".tsv")):
        with path.open("w", newline="") as stream:
            out = csv.writer(stream, delimiter="\t" if name.endswith(".tsv") else ",")
            out.writerow(["id", column])
            out.writerows(enumerate(TEXTS))
    else:
        pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
        path.write_bytes(pack.get(path.suffix, bytes)(lines.encode()))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.json",
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.xz",
        "a.jsonl.bz2",
        "a.parquet",
        "a.csv",
        "a.tsv",
        "[a] *.jsonl",
    ],
)
def test_tables_give_their_column(tmp_path, name):
    assert read(write_table(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ""])
def test_text_files_whole_and_by_line(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    data = "\ufeffone\r\n two \n\nfour\u2028still four".encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack.get(suffix, bytes)(data))
    assert read(path) == ["one\r\n two \n\nfour\u2028still four"]
    assert read(path, per_line=True) == ["one", " two ", "", "four\u2028still four"]


def test_folder_is_read_in_the_order_of_names(tmp_path):
    for name in ("b/2.txt", "b/10.md", "a.txt", ".hidden/x.txt", "picture.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    write_table(tmp_path / "c.jsonl.gz")
    assert read(tmp_path) == ["a.txt", "b/10.md", "b/2.txt", *TEXTS]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b/2.txt"]
    assert read(tmp_path / "picture.png") == ["picture.png"]


def test_several_sources_follow_each_other(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name * 4)
    assert read(tmp_path / "b", tmp_path / "a") == ["bbbb", "aaaa"]
    assert read(tmp_path / "b", tmp_path / "a", max_bytes=7) == ["bbbb"]
    assert read(tmp_path / "b", tmp_path / "a", max_bytes=8) == ["bbbb", "aaaa"]


def test_bad_utf8_is_named_with_its_place(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good\nbad \xff here\n")
    with pytest.raises(DataError, match=r"bad\.txt: byte 9 is not UTF-8"):
        read(path)
    with pytest.raises(DataError, match=r"bad\.txt: line 2, byte 4 is not UTF-8"):
        read(path, per_line=True)
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl: line 2, byte 10 is not UTF-8"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.jsonl.xz"])
def test_truncated_tables_are_named(tmp_path, name):
    path = write_table(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=name):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_truncated_text_is_named(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".xz": lzma.compress}
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack[suffix](b"some text " * 99)[:-9])
    for per_line in (False, True):
        with pytest.raises(DataError, match=f"a.txt{suffix}"):
            read(path, per_line=per_line)


@pytest.mark.parametrize("line", ['{"text": ', "[1]", '"text"'])
def test_broken_json_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + '\n{"text": "c"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: line 2 "):
        read(path)


def test_other_fields_may_change_type_and_texts_may_look_like_dates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "2020-01-01", "x": 1}\n{"text": "2020-01-02", "x": {"y": "z"}}\n')
    assert read(path) == ["2020-01-01", "2020-01-02"]


def test_csv_cells_are_taken_as_they_stand(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,NA\n2,1.0\n3,null\n4,\n5,007\n")
    assert read(path) == ["NA", "1.0", "null", "", "007"]
    path.write_text("id,text\n1,007\n2,1.50\n")  # a column that looks like numbers throughout
    assert read(path) == ["007", "1.50"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_missing_column_lists_what_there_is(tmp_path, name):
    path = write_table(tmp_path / name, column="content")
    with pytest.raises(DataError, match=r"no column 'text'; choose one of .*content"):
        read(path)
    assert read(path, text_column="content") == TEXTS


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "line 1"), ("a.parquet", "row 0")])
def test_column_of_another_type_is_refused(tmp_path, name, place):
    path = write_table(tmp_path / name)
    with pytest.raises(DataError, match=f"{place}: column 'id' holds int"):
        read(path, text_column="id")


def test_absent_values_count_as_empty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null, "x": 1}\n{"x": 2}\n{"text": "c"}\n')
    assert read(path) == ["", "", "c"]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("nothing.txt", "no such file"),
        ("*.nothing", "no such file"),
        (".", "no file ending in"),
        ("hf:", "names no data set"),
        ("installed:", "names no package"),
        ("installed:no_such_package_anywhere", "no_such_package_anywhere"),
        ("synthetic:poems", "not known"),
    ],
)
def test_wrong_sources_are_explained(tmp_path, monkeypatch, spec, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=reason):
        read(spec)


def test_prepared_folder_is_no_source(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="already prepared"):
        read(tmp_path)


def test_saved_dataset(tmp_path):
    datasets = files.quiet_datasets()
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "extra": table.select([4])}).save_to_disk(
        tmp_path / "two"
    )
    assert read(tmp_path / "one") == TEXTS
    assert read(tmp_path / "two") == TEXTS
    assert read(tmp_path / "two", hub_split="extra") == ["last"]
    with pytest.raises(DataError, match="no split 'test'; it has train, extra"):
        read(tmp_path / "two", hub_split="test")


def test_hub_path_reads_a_repository_layout(tmp_path, monkeypatch):
    """`datasets` takes a folder laid out like a hub repository under the same call as a name."""
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    write_table(tmp_path / "owner" / "name" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    assert read("hf:owner/name") == TEXTS
    with pytest.raises(DataError, match=r"hf:owner/name: cannot be loaded"):
        read("hf:owner/name", hub_split="nowhere")


def test_hub_without_network_says_what_to_do(monkeypatch):
    datasets = files.quiet_datasets()

    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"(?s)Couldn't reach.*without a network"):
        read("hf:owner/name")


def test_fingerprint_follows_content_not_place(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")

    def fingerprint(spec):
        config = PrepareConfig(sources=(str(spec),), out="unused")
        return open_sources(config)[0].fingerprint

    before = fingerprint(tmp_path / "here")
    assert before == fingerprint(tmp_path / "there")
    (tmp_path / "there" / "a.txt").write_text("sAme")
    assert before != fingerprint(tmp_path / "there")


def test_synthetic_stories_and_installed_prose():
    texts = read("synthetic:stories", num_documents=5, seed=3)
    assert len(texts) == 5
    assert texts == read("synthetic:stories", num_documents=5, seed=3)
    assert texts != read("synthetic:stories", num_documents=5, seed=4)
    assert any("JSON" in text for text in read("installed:json"))


def test_token_sources_stand_alone():
    assert token_kind(PrepareConfig(sources=("synthetic:markov",), out="o")) == "markov"
    assert token_kind(PrepareConfig(sources=("a.txt",), out="o")) is None
    with pytest.raises(DataError, match="folder of its own"):
        token_kind(PrepareConfig(sources=("a.txt", "synthetic:markov"), out="o"))


def test_reading_is_quiet(tmp_path, capfd):
    read(write_table(tmp_path / "a.jsonl"), write_table(tmp_path / "a.parquet"))
    assert capfd.readouterr() == ("", "")
