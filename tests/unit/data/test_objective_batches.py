"""Objectives behind the loader: the same batches in every world, and after a resume."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import xxhash
from prepared_folder import write_folder

from mpotrain.batch import Batch
from mpotrain.data.collation import PADDING_ID, Samples
from mpotrain.data.config import DataConfig, SourceConfig
from mpotrain.data.dataset import BlendedDataset, changes
from mpotrain.data.loader import Loader
from mpotrain.data.masked_config import MaskedConfig
from mpotrain.data.objective import open_objective
from mpotrain.data.objective_config import CausalConfig
from mpotrain.data.order import splitmix64_array
from mpotrain.data.span_config import SpanCorruptionConfig
from mpotrain.errors import DataError

T, G, V, EOT = 32, 12, 400, 0
FIELDS = [field.name for field in dataclasses.fields(Batch)]
OBJECTIVES = [
    CausalConfig(),
    CausalConfig(document_mask=True),
    MaskedConfig(min_segment=3),
    MaskedConfig(pairs=False, document_mask=False),
    SpanCorruptionConfig(num_sentinels=9),
    SpanCorruptionConfig(document_mask=True),
]
NEW = OBJECTIVES[2:]


def name_of(objective) -> str:
    return f"{objective.kind}-{objective.document_mask}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    generator = np.random.default_rng(0)
    documents = [
        np.append(generator.integers(1, V, generator.integers(5, 120)), EOT) for _ in range(120)
    ]
    path = tmp_path_factory.mktemp("objective") / "data"
    return write_folder(path, documents, vocab_size=V, eot_id=EOT)


def data_of(folder, objective, **changed) -> DataConfig:
    settings = {"sequence_length": T, "seed": 8, "split": (0.8, 0.2, 0.0)} | changed
    sources = (SourceConfig(path=str(folder)),)
    return DataConfig(sources=sources, objective=objective, **settings)


def loader_of(dataset, **options) -> Loader:
    options = {"global_batch_size": G, "micro_batch_size": G} | options
    return Loader(dataset, objective=open_objective(dataset), **options)


def joined(batches, name):
    values = [getattr(batch, name) for batch in batches]
    return None if values[0] is None else torch.cat(values)


def assert_equal_batches(ours, theirs):
    for name in FIELDS:
        one, two = joined(ours, name), joined(theirs, name)
        assert (one is None) == (two is None), name
        assert one is None or torch.equal(one, two), name


# ---- purity


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 3), (3, 2), (4, 3), (6, 1)])
def test_same_global_batch_in_every_world(folder, objective, world, micro):
    dataset = BlendedDataset(data_of(folder, objective), "train")
    for consumed in (0, 7 * G, 10_000 * G + 5):
        with loader_of(dataset, prefetch=False) as loader:
            whole = loader.microbatches(consumed)
        by_rank = []
        for rank in range(world):
            options = {"rank": rank, "world_size": world, "micro_batch_size": micro}
            with loader_of(dataset, **options) as loader:
                by_rank.append(loader.microbatches(consumed))
        step = [batch for slot in zip(*by_rank, strict=True) for batch in slot]
        assert_equal_batches(step, whole)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_prefetch_and_a_resume_change_nothing(folder, objective):
    dataset = BlendedDataset(data_of(folder, objective), "train")
    with loader_of(dataset) as ahead, loader_of(dataset, prefetch=False) as plain:
        for step in range(4):
            expected = plain.microbatches(step * G)
            assert_equal_batches(ahead.microbatches(step * G), expected)
    resumed = BlendedDataset(data_of(folder, objective), "train")
    with loader_of(resumed) as loader:
        assert_equal_batches(loader.microbatches(3 * G), expected)


@pytest.mark.parametrize("objective", NEW, ids=name_of)
def test_the_next_epoch_has_the_same_windows_and_other_masks(folder, objective):
    dataset = BlendedDataset(data_of(folder, objective, shuffle=False), "train")
    n = dataset.num_samples
    window = objective.window(T).length
    np.testing.assert_array_equal(dataset[0], dataset[n])
    with loader_of(dataset, global_batch_size=n, micro_batch_size=n) as loader:
        (first,), (second,) = loader.microbatches(0), loader.microbatches(n)
    name = "loss_mask" if objective.kind == "masked" else "targets"
    differ = (getattr(first, name) != getattr(second, name)).any(dim=1)
    assert differ.double().mean() > 0.9
    # Windows do not overlap and cover the stream.
    stream = dataset.sources[0].stream
    tokens = np.concatenate([dataset[k] for k in range(n)])
    np.testing.assert_array_equal(tokens, stream.read(0, n * window))
    assert stream.num_tokens - n * window < window


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
@pytest.mark.parametrize(("world", "micro"), [(1, 5), (2, 3), (3, 4)])
def test_evaluation_is_always_the_same(folder, objective, world, micro):
    rows: dict[int, list] = {}
    reference = BlendedDataset(data_of(folder, objective), "validation")
    with loader_of(reference, global_batch_size=1, micro_batch_size=1) as loader:
        expected = {
            int(batch.sample_ids[0]): [getattr(batch, name) for name in FIELDS]
            for batch in loader.evaluation_batches(17)
        }
    assert len(expected) == 17
    # Another seed trains on other masks; what is evaluated stays.
    dataset = BlendedDataset(data_of(folder, objective, seed=99), "validation")
    for rank in range(world):
        options = {"global_batch_size": micro * world, "micro_batch_size": micro}
        with loader_of(dataset, rank=rank, world_size=world, **options) as loader:
            for batch in loader.evaluation_batches(17):
                for row in range(micro):
                    number = int(batch.sample_ids[row])
                    if number == PADDING_ID:
                        assert not batch.loss_mask[row].any()
                        continue
                    values = [getattr(batch, name) for name in FIELDS]
                    rows[number] = [v if v is None else v[row : row + 1] for v in values]
    assert set(rows) == set(expected)
    for number, values in expected.items():
        for one, two in zip(values, rows[number], strict=True):
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)


# ---- next tokens


def test_documents_of_next_token_prediction(folder):
    plain = BlendedDataset(data_of(folder, CausalConfig()), "train")
    masked = BlendedDataset(data_of(folder, CausalConfig(document_mask=True)), "train")
    with loader_of(plain) as one, loader_of(masked) as two:
        (before,), (after,) = one.microbatches(0), two.microbatches(0)
    assert before.document_ids is None
    assert before.positions is None
    for name in ("inputs", "targets", "loss_mask", "sample_ids"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert after.loss_mask.all()
    for row in range(G):
        document, position = 1, 0
        for place, token in enumerate(after.inputs[row].tolist()):
            assert (int(after.document_ids[row, place]), int(after.positions[row, place])) == (
                document,
                position,
            )
            position += 1
            if token == EOT:
                document, position = document + 1, 0
    assert after.document_ids.max() > 1


def test_a_loader_without_an_objective_predicts_next_tokens(folder):
    dataset = BlendedDataset(data_of(folder, CausalConfig()), "train")
    with Loader(dataset, global_batch_size=4, micro_batch_size=4) as loader:
        (batch,) = loader.microbatches(0)
    for row in range(4):
        assert batch.inputs[row].tolist() == dataset[row][:-1].tolist()
        assert batch.targets[row].tolist() == dataset[row][1:].tolist()
    # Inputs and targets do not share memory, not even in a batch of one row.
    with Loader(dataset, global_batch_size=1, micro_batch_size=1) as loader:
        (batch,) = loader.microbatches(0)
    second = int(batch.targets[0, 0])
    batch.inputs[0, 1] = -7
    assert int(batch.targets[0, 0]) == second


@pytest.mark.parametrize("objective", NEW, ids=name_of)
def test_data_and_objective_that_do_not_belong_together_are_refused(folder, objective):
    dataset = BlendedDataset(data_of(folder, objective), "train")
    with (
        Loader(dataset, global_batch_size=4, micro_batch_size=4) as loader,
        pytest.raises(ValueError, match=r"takes samples of 33 tokens.*data\.objective"),
    ):
        loader.microbatches(0)


# ---- fingerprint and errors


def test_fingerprint_names_the_objective_only_where_there_was_a_choice(folder):
    plain = BlendedDataset(data_of(folder, CausalConfig()), "train").fingerprint
    assert "data.objective" not in plain
    for objective in OBJECTIVES[1:]:
        other = BlendedDataset(data_of(folder, objective), "train").fingerprint
        (line,) = changes(plain, other)
        assert line.startswith("data.objective: was None, is {'kind'")
        assert changes(other, other) == []
    rates = [
        BlendedDataset(data_of(folder, MaskedConfig(rate=rate)), "train") for rate in (0.15, 0.2)
    ]
    assert rates[0].digest != rates[1].digest


def test_too_little_data_says_what_a_sample_takes(folder):
    objective = SpanCorruptionConfig()
    length = objective.window(20_000).length
    with pytest.raises(DataError, match=f"less than one sample of {length};"):
        BlendedDataset(data_of(folder, objective, sequence_length=20_000), "train")


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        (CausalConfig(document_mask=True), r"data\.objective\.document_mask"),
        (MaskedConfig(), r"data\.objective\.document_mask"),
        (SpanCorruptionConfig(), r"data\.objective\.eos_id"),
        (MaskedConfig(document_mask=False, whole_word=True), r"data\.objective\.whole_word"),
    ],
)
def test_token_ids_without_ends_or_words_are_refused(tmp_path, objective, key):
    folder = write_folder(tmp_path / "ids", [np.arange(300)], vocab_size=300)
    dataset = BlendedDataset(data_of(folder, objective, split=(1.0, 0.0, 0.0)), "train")
    with pytest.raises(DataError, match=key):
        open_objective(dataset)


@pytest.mark.parametrize(
    ("objective", "name", "digest"),
    [
        (MaskedConfig(min_segment=3), "inputs", "3a37c0b2e3dbef87"),
        (SpanCorruptionConfig(), "encoder_inputs", "537f70c7d0d1507d"),
        (SpanCorruptionConfig(), "targets", "e13ba7eaa71eec39"),
    ],
)
def test_masks_of_recorded_runs_stay_what_they_were(folder, objective, name, digest):
    """A checkpoint holds no masks: whoever changes these bits changes every run that goes on."""
    made = open_objective(BlendedDataset(data_of(folder, objective), "train"))
    length = made.sample_length
    # Tokens from our own generator: those of numpy may change with its version.
    tokens = (splitmix64_array(np.arange(G * length, dtype=np.uint64)) % V).astype(np.int64)
    batch = made.collate(Samples(tokens.reshape(G, length), range(G)), G)
    assert xxhash.xxh3_64_hexdigest(getattr(batch, name).numpy().tobytes()) == digest
