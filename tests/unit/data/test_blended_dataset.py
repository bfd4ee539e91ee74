"""Blends of several prepared folders: weights, epochs, fingerprints."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
from prepared_folder import write_folder

from mpotrain.data.config import DataConfig, SourceConfig
from mpotrain.data.dataset import BlendedDataset, changes
from mpotrain.data.order import BLEND_BLOCK
from mpotrain.errors import DataError

FRACTIONS = (0.6, 0.3, 0.1)


def config(*sources: SourceConfig, **changed) -> DataConfig:
    settings = {"sequence_length": 8, "seed": 3, "split": FRACTIONS} | changed
    return DataConfig(sources=sources, **settings)


@pytest.fixture(scope="module")
def blend_folders(tmp_path_factory):
    """Three folders with one vocabulary whose tokens do not overlap (one big stream each)."""
    root = tmp_path_factory.mktemp("blend")
    sizes, start, folders = (2000, 9000, 700), 0, []
    for name, size in zip("abc", sizes, strict=True):
        documents = np.array_split(np.arange(start, start + size), 20)
        folders.append(write_folder(root / name, documents, vocab_size=sum(sizes)))
        start += size
    return folders


def three(folders, weights=(0.5, 0.3, 0.2), **changed) -> DataConfig:
    sources = (
        SourceConfig(path=str(folder), weight=weight)
        for folder, weight in zip(folders, weights, strict=True)
    )
    return config(*sources, **({"split": (1.0, 0.0, 0.0)} | changed))


def source_of(tokens: np.ndarray) -> int:
    return int(np.searchsorted([2000, 11_000], tokens[0], side="right"))


def test_blend_has_the_weights_and_exact_epochs_of_every_source(blend_folders):
    dataset = BlendedDataset(three(blend_folders), "train")
    total = BLEND_BLOCK + 1000
    seen: list[list[int]] = [[], [], []]
    for index in range(total):
        tokens = dataset[index]
        assert tokens.shape == (9,)
        assert (np.diff(tokens) == 1).all()
        seen[source_of(tokens)].append(int(tokens[0]))
    for firsts, weight, source in zip(seen, (0.5, 0.3, 0.2), dataset.sources, strict=True):
        assert abs(len(firsts) / total - weight) < 0.001 * weight
        n = source.num_samples
        whole = {int(source.window(number)[0]) for number in range(n)}
        for epoch in range(3):
            assert set(firsts[epoch * n : (epoch + 1) * n]) == whole
    epochs = dataset.epochs(total)
    for firsts, epoch, source in zip(seen, epochs, dataset.sources, strict=True):
        assert epoch == pytest.approx(len(firsts) / source.num_samples, rel=1e-3)


def test_epoch_of_a_blend_ends_where_the_first_source_repeats(blend_folders):
    dataset = BlendedDataset(three(blend_folders), "train")
    n = dataset.num_samples
    firsts = [int(dataset[index][0]) for index in range(n + 1)]
    assert len(set(firsts[:n])) == n
    drawn = Counter(source_of(dataset[index]) for index in range(n + 1))
    assert any(drawn[s] > source.num_samples for s, source in enumerate(dataset.sources))


def test_fixed_samples_do_not_repeat_and_do_not_depend_on_the_seed(blend_folders):
    one, two = (BlendedDataset(three(blend_folders, seed=seed), "train") for seed in (1, 2))
    fixed = [one.fixed(index) for index in range(one.num_samples)]
    assert len({int(tokens[0]) for tokens in fixed}) == one.num_samples
    for index, tokens in enumerate(fixed):
        np.testing.assert_array_equal(two.fixed(index), tokens)
    assert any(int(one[k][0]) != int(two[k][0]) for k in range(10))
    for bad in (-1, one.num_samples):
        with pytest.raises(IndexError):
            one.fixed(bad)


def test_sample_is_a_pure_function_of_its_number(blend_folders):
    one, two = (BlendedDataset(three(blend_folders), "train") for _ in range(2))
    numbers = [10**12 + 5, 0, 77_777, 3, 10**6]
    forward = [one[number] for number in numbers]
    backward = [two[number] for number in reversed(numbers)]
    for first, second in zip(forward, reversed(backward), strict=True):
        np.testing.assert_array_equal(first, second)


def test_fingerprint_names_what_changed(blend_folders, tmp_path):
    now = BlendedDataset(three(blend_folders), "train")
    moved = [shutil.copytree(folder, tmp_path / folder.name) for folder in blend_folders]
    same = BlendedDataset(three(moved), "train")
    assert same.digest == now.digest
    assert changes(same.fingerprint, now.fingerprint) == []
    scaled = BlendedDataset(three(blend_folders, weights=(5, 3, 2)), "train")
    assert scaled.digest == now.digest
    other_data = write_folder(tmp_path / "d", [np.arange(500)], vocab_size=11_700)
    cases = {
        "data.sequence_length": three(blend_folders, sequence_length=9),
        "data.seed": three(blend_folders, seed=4),
        "data.split": three(blend_folders, split=(0.9, 0.1, 0.0)),
        "data.shuffle": three(blend_folders, shuffle=False),
        "data.sources.weight": three(blend_folders, weights=(0.5, 0.2, 0.3)),
        "data.sources": three([*blend_folders[:2], other_data]),
    }
    digests = {now.digest}
    for key, changed in cases.items():
        dataset = BlendedDataset(changed, "train")
        (line,) = changes(now.fingerprint, dataset.fingerprint)
        assert line.startswith(f"{key}: was ")
        digests.add(dataset.digest)
    assert len(digests) == 1 + len(cases)


def test_different_tokenizers_are_refused_with_both_names(blend_folders, tmp_path):
    other = write_folder(tmp_path / "other", [np.arange(500)], vocab_size=500)
    with pytest.raises(DataError, match=r"a/manifest\.json.*other/manifest\.json"):
        BlendedDataset(three([*blend_folders[:2], other]), "train")


def test_a_weight_that_cannot_be_kept_is_refused(blend_folders):
    with pytest.raises(DataError, match=r"data\.sources.*weight 1e-06"):
        BlendedDataset(three(blend_folders, weights=(1.0, 1.0, 1e-6)), "train")


def test_facts_about_the_blend(blend_folders, tmp_path):
    dataset = BlendedDataset(three(blend_folders), "train")
    assert dataset.tokenizer.vocab_size == 11_700
    assert dataset.tokenizer_path is None
    assert dataset.bytes_per_token is None
    documents = np.array_split(np.arange(600), 40)
    folder = write_folder(tmp_path / "one", documents, vocab_size=600, raw_bytes=[31] * 40)
    single = BlendedDataset(config(SourceConfig(path=str(folder))), "validation")
    assert single.bytes_per_token == single.sources[0].bytes_per_token
    assert single.num_samples == single.sources[0].num_samples


def test_bytes_per_token_of_a_blend_is_weighted(tmp_path):
    folders = [
        write_folder(tmp_path / name, [np.arange(90)], vocab_size=90, raw_bytes=[size])
        for name, size in (("x", 180), ("y", 450))
    ]
    sources = (SourceConfig(path=str(f), weight=w) for f, w in zip(folders, (3, 1), strict=True))
    dataset = BlendedDataset(config(*sources, split=(1.0, 0.0, 0.0)), "train")
    assert dataset.bytes_per_token == pytest.approx(0.75 * 2 + 0.25 * 5, rel=1e-12)
