from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_folder import write_folder

from mpotrain.data.config import DataConfig, SourceConfig
from mpotrain.data.dataset import BlendedDataset, TokenDataset
from mpotrain.data.stream import SPLITS, TokenStream, split_of
from mpotrain.data.synthetic import position_starts, positions
from mpotrain.errors import DataError

FRACTIONS = (0.6, 0.3, 0.1)
NUM_DOCUMENTS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 documents of unique tokens in 18 shards; raw text of 3 bytes a token, plus 1."""
    source = positions(NUM_DOCUMENTS, seed=1, min_length=1, max_length=60)
    documents = list(source.documents)
    return write_folder(
        tmp_path_factory.mktemp("data") / "positions",
        documents,
        vocab_size=source.vocab_size,
        raw_bytes=[3 * len(document) + 1 for document in documents],
    )


@pytest.fixture(scope="module")
def train_stream(folder):
    return TokenStream(folder, "train", FRACTIONS)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def documents_of(split: str, fractions=FRACTIONS) -> list[int]:
    chosen = split_of(np.arange(NUM_DOCUMENTS), fractions) == SPLITS.index(split)
    return np.flatnonzero(chosen).tolist()


def tokens_of(split: str, fractions=FRACTIONS) -> np.ndarray:
    """The stream of a split by definition: its documents one after another."""
    starts = position_starts(NUM_DOCUMENTS, 1, min_length=1, max_length=60)
    parts = [np.arange(starts[d], starts[d + 1]) for d in documents_of(split, fractions)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def config(*sources: SourceConfig, **changed) -> DataConfig:
    settings = {"sequence_length": 8, "seed": 3, "split": FRACTIONS} | changed
    return DataConfig(sources=sources, **settings)


# ---- splits and streams


@pytest.mark.parametrize("fractions", [FRACTIONS, (0.98, 0.01, 0.01), (0.5, 0.5, 0.0)])
def test_split_shares_and_stability(fractions):
    splits = split_of(np.arange(200_000), fractions)
    shares = np.bincount(splits, minlength=3) / 200_000
    assert np.abs(shares - fractions).max() < 4 * np.sqrt(0.25 / 200_000)
    # A document does not move when others are appended, and shapes are kept.
    np.testing.assert_array_equal(
        split_of(np.arange(100).reshape(4, 25), fractions).ravel(), splits[:100]
    )


@pytest.mark.parametrize(
    "fractions", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.7, 0.299, 0.0), (0.1, 0.0, 0.9)]
)
def test_a_split_of_nothing_gets_nothing_and_all_documents_go_somewhere(fractions):
    found = Counter(split_of(np.arange(300_000), fractions).tolist())
    assert set(found) == {index for index, part in enumerate(fractions) if part > 0}


@pytest.mark.parametrize("fractions", [FRACTIONS, (1.0, 0.0, 0.0), (0.05, 0.15, 0.8)])
@pytest.mark.parametrize("split", SPLITS)
def test_stream_holds_the_documents_of_its_split_in_order(folder, split, fractions):
    stream = TokenStream(folder, split, fractions)
    expected = tokens_of(split, fractions)
    assert stream.num_tokens == len(expected)
    assert stream.num_documents == len(documents_of(split, fractions))
    assert stream.num_bytes == 3 * stream.num_tokens + stream.num_documents
    np.testing.assert_array_equal(stream.read(0, stream.num_tokens), expected)
    assert stream.read(0, 0).dtype == np.int64


def test_the_splits_part_the_corpus(folder):
    streams = [TokenStream(folder, split, FRACTIONS) for split in SPLITS]
    tokens = np.concatenate([stream.read(0, stream.num_tokens) for stream in streams])
    np.testing.assert_array_equal(np.sort(tokens), np.arange(streams[0].manifest.num_tokens))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_piece_of_the_stream_is_read_exactly(train_stream, data):
    stream = train_stream
    start = data.draw(st.integers(0, stream.num_tokens))
    count = data.draw(st.integers(0, stream.num_tokens - start))
    expected = tokens_of("train")[start : start + count]
    assert stream.read(start, count).tolist() == expected.tolist()


def test_pieces_outside_the_stream_are_refused(folder):
    stream = TokenStream(folder, "train", FRACTIONS)
    for start, count in [(-1, 1), (stream.num_tokens, 1), (0, stream.num_tokens + 1), (0, -1)]:
        with pytest.raises(IndexError):
            stream.read(start, count)


def test_wide_ids_and_empty_documents(tmp_path):
    documents = [np.array(ids, np.int64) for ids in ([70_000, 1], [], [99_999], [], [2, 3, 4])]
    folder = write_folder(tmp_path / "wide", documents, vocab_size=100_000, documents_per_shard=2)
    stream = TokenStream(folder, "train", (1.0, 0.0, 0.0))
    assert stream.read(0, 6).tolist() == [70_000, 1, 99_999, 2, 3, 4]
    assert stream.read(2, 3).tolist() == [99_999, 2, 3]


# ---- one folder


def test_windows_overlap_by_one_token_and_cover_the_stream(folder):
    dataset = TokenDataset(folder, "train", 0, FRACTIONS, 8)
    expected = tokens_of("train")
    assert len(dataset) == dataset.num_samples == (len(expected) - 1) // 8
    for number in range(len(dataset)):
        np.testing.assert_array_equal(dataset.window(number), expected[number * 8 : number * 8 + 9])


@pytest.mark.parametrize("length", [1, 7, 64])
def test_every_epoch_is_another_permutation(folder, length):
    dataset = TokenDataset(folder, "train", 5, FRACTIONS, length)
    n = len(dataset)
    orders = []
    for epoch in range(3):
        firsts = [int(dataset[epoch * n + k][0]) for k in range(n)]
        orders.append(firsts)
        assert sorted(firsts) == [int(dataset.window(number)[0]) for number in range(n)]
    for one, two in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, two, strict=True)) < max(8, n // 4)


def test_order_depends_on_seed_and_source_and_on_nothing_else(folder):
    def order(**changed):
        arguments = {"seed": 5, "source": 0} | changed
        seed = arguments.pop("seed")
        dataset = TokenDataset(folder, "train", seed, FRACTIONS, 4, **arguments)
        return [int(dataset[k][0]) for k in range(len(dataset))]

    assert order() == order()
    assert order(verify=True) == order()
    assert order(seed=6) != order()
    assert order(source=1) != order()
    assert sorted(order(seed=6)) == sorted(order())
    plain = order(shuffle=False)
    assert plain == sorted(plain) != order()


def test_sample_before_the_first_is_refused(folder):
    with pytest.raises(IndexError):
        TokenDataset(folder, "train", 0, FRACTIONS, 8)[-1]


def test_bytes_per_token_is_exact(folder, tmp_path):
    dataset = TokenDataset(folder, "validation", 0, FRACTIONS, 8)
    documents, tokens = len(documents_of("validation")), len(tokens_of("validation"))
    assert dataset.bytes_per_token == (3 * tokens + documents) / tokens
    silent = write_folder(tmp_path / "silent", [np.arange(50)], vocab_size=50)
    assert TokenDataset(silent, "train", 0, (1.0, 0.0, 0.0), 8).bytes_per_token is None


@pytest.mark.parametrize(("split", "fractions"), [("test", (0.5, 0.5, 0.0)), ("train", FRACTIONS)])
def test_too_little_data_is_said_with_all_facts(folder, split, fractions):
    with pytest.raises(DataError, match=rf"the {split} split .*data\.split.*data\.sequence_length"):
        TokenDataset(folder, split, 0, fractions, 100_000)


# ---- faults


def test_missing_shards_are_all_named(copy):
    (copy / "shard-00002.bin").unlink()
    (copy / "shard-00005.idx").unlink()
    with pytest.raises(DataError, match=r"(?s)shard-00002\.bin.*shard-00005\.idx"):
        TokenDataset(copy, "train", 0, FRACTIONS, 8)


@pytest.mark.parametrize("name", ["shard-00003.bin", "shard-00003.idx", "shard-00003.bytes.npy"])
def test_truncated_files_are_named_on_opening(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=name):
        TokenDataset(copy, "train", 0, FRACTIONS, 8)


@pytest.mark.parametrize("name", ["shard-00003.bin", "shard-00003.bytes.npy"])
def test_a_flipped_bit_is_found_by_verification(copy, name):
    path = copy / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=name):
        TokenDataset(copy, "train", 0, FRACTIONS, 8, verify=True)
    with pytest.raises(DataError, match=name):
        BlendedDataset(config(SourceConfig(path=str(copy))), "train", verify=True)


def test_an_index_that_is_whole_but_not_the_manifests_is_named(copy):
    one, two = copy / "shard-00001.bin", copy / "shard-00002.bin"
    for suffix in (".bin", ".idx"):
        shutil.copyfile(two.with_suffix(suffix), one.with_suffix(suffix))
    with pytest.raises(DataError, match=r"shard-00001\."):
        TokenDataset(copy, "train", 0, FRACTIONS, 8)


@pytest.mark.parametrize(
    ("key", "value"), [("num_documents", 8), ("num_tokens", 1), ("dtype", "int16")]
)
def test_a_manifest_that_does_not_fit_its_shards_is_named(copy, key, value):
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    (content if key == "dtype" else content["shards"][0])[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"shard-00000\.idx"):
        TokenDataset(copy, "train", 0, FRACTIONS, 8)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_planted_pickle_is_never_executed(copy, tmp_path):
    bombs = np.array([Bomb(tmp_path / "marker")] * 7, dtype=object)
    np.save(copy / "shard-00000.bytes.npy", bombs, allow_pickle=True)
    for verify in (False, True):
        with pytest.raises(DataError, match=r"shard-00000\.bytes\.npy"):
            TokenDataset(copy, "train", 0, FRACTIONS, 8, verify=verify)
    assert not (tmp_path / "marker").exists()


def test_raw_lengths_of_another_shape_or_type_are_refused(copy):
    path = copy / "shard-00000.bytes.npy"
    for content in (np.zeros(3, np.int64), np.zeros(7, np.int32), np.zeros((7, 1), np.int64)):
        np.save(path, content)
        with pytest.raises(DataError, match=r"shard-00000\.bytes\.npy"):
            TokenDataset(copy, "train", 0, FRACTIONS, 8)


def test_a_folder_that_was_not_prepared(tmp_path):
    with pytest.raises(DataError, match="mpotrain prepare"):
        TokenDataset(tmp_path, "train", 0, FRACTIONS, 8)
