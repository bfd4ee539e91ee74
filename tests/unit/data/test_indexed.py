"""Megatron's token file format: round trips, refusals, and megatron-core itself as the judge."""

import errno
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpotrain.data.indexed import IndexedReader, IndexedWriter, bin_path, idx_path, token_dtype
from mpotrain.errors import DataError, StorageError

U2, I4 = np.dtype("<u2"), np.dtype("<i4")


def write(prefix, documents, dtype=U2, vocab_size=None):
    with IndexedWriter(prefix, dtype, vocab_size) as writer:
        for document in documents:
            writer.add_document(np.asarray(document, dtype=np.int64))
    return writer


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=9), max_size=7),
    dtype=st.sampled_from([U2, I4, np.dtype("<i8")]),
)
def test_round_trip(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("shard") / "s"
    write(prefix, documents, dtype)
    reader = IndexedReader(prefix)
    assert reader.dtype == dtype
    assert [reader[i].tolist() for i in range(len(reader))] == documents
    assert reader.tokens.tolist() == [token for document in documents for token in document]
    assert reader.sequence_lengths.tolist() == [len(document) for document in documents]
    assert reader.document_indices.tolist() == list(range(len(documents) + 1))


def test_exact_bytes_of_the_format(tmp_path):
    """The layout, spelled out by hand and not by the writer's own constants."""
    write(tmp_path / "s", [[1, 2], [3]], U2)
    assert bin_path(tmp_path / "s").read_bytes() == struct.pack("<3H", 1, 2, 3)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 2, 1) + struct.pack("<2q", 0, 4) + struct.pack("<3q", 0, 1, 2)
    assert idx_path(tmp_path / "s").read_bytes() == expected


def test_tokens_are_mapped_not_loaded(tmp_path):
    write(tmp_path / "s", [[1, 2, 3]])
    tokens = IndexedReader(tmp_path / "s").tokens
    base = tokens
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not tokens.flags.writeable


@pytest.mark.parametrize(
    ("tokens", "vocab_size"),
    [([70_000], None), ([2**16], None), ([-1], None), ([10], 10), ([0, 11, 1], 11)],
)
def test_ids_never_wrap(tmp_path, tokens, vocab_size):
    with pytest.raises(DataError, match=r"s\.bin, document 1: token id"):
        write(tmp_path / "s", [[1], tokens], U2, vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_largest_ids_fit(tmp_path):
    write(tmp_path / "s", [[2**16 - 1, 0]], U2)
    assert IndexedReader(tmp_path / "s")[0].tolist() == [2**16 - 1, 0]


def test_unsuitable_types_are_refused(tmp_path):
    with pytest.raises(DataError, match="float32"):
        IndexedWriter(tmp_path / "s", np.dtype("f4"))
    with pytest.raises(DataError, match="does not fit uint16"):
        IndexedWriter(tmp_path / "s", U2, vocab_size=2**16 + 1)
    for bad in (np.array([1.5]), np.array([[1, 2]])):
        with (
            pytest.raises(DataError, match="list of integers"),
            IndexedWriter(tmp_path / "s", U2) as writer,
        ):
            writer.add_document(bad)
    assert list(tmp_path.iterdir()) == []


def test_element_type_follows_the_vocabulary():
    assert token_dtype(2**16) == U2
    assert token_dtype(2**16 + 1) == I4
    with pytest.raises(DataError):
        token_dtype(2**31 + 1)


def test_nothing_appears_before_close(tmp_path):
    writer = IndexedWriter(tmp_path / "s", U2)
    writer.add_document(np.array([1]))
    assert not bin_path(tmp_path / "s").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_failing_close_leaves_nothing_unfinished(tmp_path, monkeypatch, fail_at):
    calls = 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path / "s", [[1, 2]])
    assert not idx_path(tmp_path / "s").exists()
    assert list(tmp_path.glob("*.tmp-*")) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["truncate", "extend", "remove", "empty"])
def test_damaged_files_are_named(tmp_path, suffix, damage):
    write(tmp_path / "s", [[1, 2, 3], [4]])
    path = tmp_path / f"s{suffix}"
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"truncate": data[:-1], "extend": data + b"\0\0", "empty": b""}[damage])
    with pytest.raises(DataError, match=f"s{suffix}"):
        IndexedReader(tmp_path / "s")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_files_that_cannot_be_read_are_named(tmp_path, suffix, monkeypatch):
    write(tmp_path / "s", [[1, 2, 3], [4]])
    memmap = np.memmap

    def forbidden(path, **more):
        if path.suffix == suffix:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return memmap(path, **more)

    monkeypatch.setattr(np, "memmap", forbidden)
    with pytest.raises(DataError, match=rf"s{suffix} cannot be read .*Permission denied"):
        IndexedReader(tmp_path / "s")


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"X", "magic"),
        (9, b"\x02", "version"),
        (17, b"\x06", "element type"),
        (17, b"\x63", "element type"),
        (34, b"\x09", r"idx"),  # a length
        (42, b"\x02", "one after another"),  # a pointer
    ],
)
def test_damaged_index_is_refused(tmp_path, offset, value, reason):
    write(tmp_path / "s", [[1, 2, 3], [4]])
    path = idx_path(tmp_path / "s")
    data = bytearray(path.read_bytes())
    data[offset : offset + 1] = value
    path.write_bytes(data)
    with pytest.raises(DataError, match=reason):
        IndexedReader(tmp_path / "s")


DOCUMENTS = [[5, 1, 2], [7], [], [65_535, 0, 3, 9]]


@pytest.fixture(scope="module")
def megatron():
    name = "megatron.core.datasets.indexed_dataset"
    return pytest.importorskip(name, reason="megatron-core is not installed")


@pytest.mark.parametrize("dtype", [U2, I4])
def test_megatron_reads_ours(tmp_path, megatron, dtype):
    write(tmp_path / "s", DOCUMENTS, dtype)
    theirs = megatron.IndexedDataset(str(tmp_path / "s"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.index.dtype == dtype.type
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_megatron(tmp_path, megatron, dtype):
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    ours = IndexedReader(tmp_path / "m")
    assert [ours[i].tolist() for i in range(len(ours))] == DOCUMENTS
    write(tmp_path / "s", DOCUMENTS, np.dtype(dtype))
    for suffix in ("bin", "idx"):
        same = (tmp_path / f"m.{suffix}").read_bytes() == (tmp_path / f"s.{suffix}").read_bytes()
        assert same, suffix
