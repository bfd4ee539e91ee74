"""From generated text through `prepare` to batches: what goes in comes out, counted in bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpotrain.data.config import DataConfig, PrepareConfig, SentencePieceConfig, SourceConfig
from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.loader import Loader
from mpotrain.data.markov import MarkovChain
from mpotrain.data.prepare import prepare
from mpotrain.data.stories import check_story
from mpotrain.data.stream import SPLITS
from mpotrain.data.synthetic import stories
from mpotrain.data.tokenizer import load_tokenizer

SPLIT = (0.7, 0.2, 0.1)


def prepared(folder, **settings) -> SourceConfig:
    prepare(PrepareConfig(out=str(folder), num_workers=0, **settings))
    return SourceConfig(path=str(folder))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> SourceConfig:
    return prepared(
        tmp_path_factory.mktemp("text") / "stories",
        sources=("synthetic:stories",),
        num_documents=600,
        seed=9,
        documents_per_shard=128,
        tokenizer=SentencePieceConfig(vocab_size=340),
    )


def test_splits_hold_the_documents_and_their_exact_bytes(text_folder):
    texts: list[str] = []
    for split in SPLITS:
        data = DataConfig(sources=(text_folder,), sequence_length=32, split=SPLIT)
        dataset = BlendedDataset(data, split, verify=True)
        stream = dataset.sources[0].stream
        tokenizer = load_tokenizer(dataset.tokenizer_path)
        tokens = stream.read(0, stream.num_tokens)
        ends = np.flatnonzero(tokens == tokenizer.eot_id)
        assert ends[-1] == stream.num_tokens - 1
        parts = np.split(tokens, ends + 1)[:-1]
        decoded = [tokenizer.decode(part[:-1].tolist()) for part in parts]
        assert len(decoded) == stream.num_documents
        num_bytes = sum(len(text.encode()) for text in decoded)
        assert num_bytes == stream.num_bytes
        assert dataset.bytes_per_token == num_bytes / stream.num_tokens
        texts += decoded
    assert all(check_story(text) for text in texts)
    assert sorted(texts) == sorted(stories(600, seed=9))


def test_two_openings_give_the_same_batches(text_folder):
    data = DataConfig(sources=(text_folder,), sequence_length=32, split=SPLIT, seed=1)
    batches = []
    for _ in range(2):
        dataset = BlendedDataset(data, "train")
        with Loader(dataset, global_batch_size=8, micro_batch_size=4) as loader:
            batches.append(torch.cat([batch.inputs for batch in loader.microbatches(8000)]))
    assert torch.equal(*batches)
    assert int(batches[0].max()) < dataset.tokenizer.vocab_size


def test_markov_batches_have_the_entropy_that_the_manifest_promises(tmp_path):
    source = prepared(
        tmp_path / "markov",
        sources=("synthetic:markov",),
        num_tokens=150_000,
        seed=2,
        documents_per_shard=50,
    )
    dataset = BlendedDataset(
        DataConfig(sources=(source,), sequence_length=64, split=SPLIT), "train"
    )
    manifest = dataset.sources[0].stream.manifest
    assert manifest.tokenizer.vocab_size == 16
    assert dataset.tokenizer_path is None
    logs = torch.from_numpy(np.log(MarkovChain(16, 2).probabilities))
    with Loader(dataset, global_batch_size=512, micro_batch_size=512) as loader:
        (batch,) = loader.microbatches(0)
    # The perfect model: the chain itself, on all targets with two tokens of context.
    losses = -logs[batch.inputs[:, :-1], batch.inputs[:, 1:], batch.targets[:, 1:]]
    assert 0.98 < float(losses.mean()) / float(manifest.extra["entropy_rate"]) < 1.02
