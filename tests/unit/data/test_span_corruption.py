"""Span corruption against the published procedure, done token by token."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpotrain.data.collation import PADDING_ID, Samples
from mpotrain.data.draws import Purpose, bits, sample_keys
from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.span_config import SpanCorruptionConfig
from mpotrain.data.spans import SpanCorruptionObjective, divide

EOT, V = 1, 60
TOKENIZER = TokenizerEntry(kind="identity", digest="", vocab_size=V, eot_id=EOT)
START = 0
NUM_SENTINELS = 40
FIRST = V + NUM_SENTINELS - 1


def config_of(**changed) -> SpanCorruptionConfig:
    return SpanCorruptionConfig(**({"num_sentinels": NUM_SENTINELS, "start_id": START} | changed))


def batch_of(config, length, windows=None, *, count=4, seed=3, fixed=False, num_rows=None, first=0):
    maker = SpanCorruptionObjective(
        config, sequence_length=length, seed=seed, split="train", tokenizer=TOKENIZER
    )
    if windows is None:
        generator = np.random.default_rng(seed)
        windows = generator.integers(1, V, (count, maker.sample_length))
    windows = np.asarray(windows)
    samples = Samples(windows, range(first, first + len(windows)), fixed)
    return windows, maker.collate(samples, len(windows) if num_rows is None else num_rows)


def is_sentinel(token: int) -> bool:
    return FIRST - NUM_SENTINELS < token <= FIRST


def spans_of(batch, row: int) -> list[list[int]]:
    """The spans that the targets of a row hold, by their sentinels alone."""
    *body, end = batch.targets[row].tolist()
    assert end == EOT
    spans: list[list[int]] = []
    for token in body:
        if is_sentinel(token):
            assert token == FIRST - len(spans)
            spans.append([])
        else:
            spans[-1].append(token)
    return spans


# ---- the text comes back


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(3, 90),
    rate=st.floats(0.02, 0.5),
    mean=st.floats(1.0, 6.0),
    seed=st.integers(0, 2**40),
)
def test_targets_put_into_the_inputs_give_back_the_window(length, rate, mean, seed):
    config = config_of(rate=rate, mean_span=mean)
    if config.problems("o", length):
        return
    windows, batch = batch_of(config, length, seed=seed)
    lengths = config.spans(length)
    assert batch.encoder_inputs.shape == (4, length)
    assert batch.targets.shape == batch.inputs.shape == (4, config.lengths(length).targets)
    assert batch.loss_mask.all()
    for row, window in enumerate(windows.tolist()):
        spans = spans_of(batch, row)
        assert len(spans) == lengths.num_spans
        assert sum(map(len, spans)) == lengths.num_noise
        assert min(map(len, spans)) >= 1
        *body, end = batch.encoder_inputs[row].tolist()
        assert end == EOT
        places = [place for place, token in enumerate(body) if is_sentinel(token)]
        assert [body[place] for place in places] == [FIRST - k for k in range(len(spans))]
        # A window begins with text, ends with a span, and no two spans are neighbours.
        assert places[0] > 0
        assert places[-1] == len(body) - 1
        assert all(b - a > 1 for a, b in itertools.pairwise(places))
        merged = [spans[FIRST - token] if is_sentinel(token) else [token] for token in body]
        assert list(itertools.chain(*merged)) == window
        shifted = [START, *batch.targets[row].tolist()[:-1]]
        assert batch.inputs[row].tolist() == shifted


def test_the_lengths_of_t5():
    config = config_of()
    _, batch = batch_of(config, 512, count=2)
    assert batch.encoder_inputs.shape == (2, 512)
    assert batch.targets.shape == (2, 114)
    assert batch.document_ids is None
    assert batch.encoder_document_ids is None
    assert batch.positions is None


def test_ids_of_t5_are_used_where_they_are_given():
    config = SpanCorruptionConfig(first_sentinel_id=32_099, eos_id=1, start_id=0)
    tokenizer = TokenizerEntry(kind="x", digest="", vocab_size=32_000)
    maker = SpanCorruptionObjective(
        config, sequence_length=64, seed=0, split="train", tokenizer=tokenizer
    )
    windows = np.full((1, maker.sample_length), 7)
    batch = maker.collate(Samples(windows, [0]), 1)
    sentinels = [token for token in batch.encoder_inputs[0].tolist() if token > 7]
    assert sentinels == [32_099 - k for k in range(len(sentinels))]
    assert batch.targets[0, 0] == 32_099
    assert batch.targets[0, -1] == batch.encoder_inputs[0, -1] == 1
    assert batch.inputs[0, 0] == 0


# ---- how text is divided


@pytest.mark.parametrize(("items", "parts"), [(1, 1), (5, 1), (5, 5), (6, 3)])
def test_every_division_comes_equally_often(items, parts):
    n = 20_000
    draws = bits(sample_keys(0, "train", range(n), fixed=False), Purpose.KEPT, items - 1)
    sizes = divide(items, parts, draws)
    assert sizes.shape == (n, parts)
    assert (sizes.sum(axis=1) == items).all()
    assert (sizes >= 1).all()
    cuts = itertools.combinations(range(1, items), parts - 1)
    expected = {tuple(np.diff([0, *cut, items]).tolist()) for cut in cuts}
    counts = Counter(map(tuple, sizes.tolist()))
    assert set(counts) == expected
    share = 1 / len(expected)
    margin = 4.5 * (n * share * (1 - share)) ** 0.5
    assert all(abs(count - n * share) <= margin for count in counts.values())


def published_mask(length: int, density: float, mean: float, generator) -> np.ndarray:
    """`random_spans_noise_mask` of the published T5 code, with numpy for TensorFlow."""
    num_noise_tokens = min(max(round(length * density), 1), length - 1)
    num_noise_spans = max(round(num_noise_tokens / mean), 1)

    def random_segmentation(num_items: int) -> np.ndarray:
        first = np.arange(num_items - 1) < num_noise_spans - 1
        generator.shuffle(first)
        segment = np.cumsum(np.concatenate([[0], first]))
        return np.bincount(segment, minlength=num_noise_spans)

    noise = random_segmentation(num_noise_tokens)
    kept = random_segmentation(length - num_noise_tokens)
    starts = np.cumsum(np.stack([kept, noise], axis=1).reshape(-1))[:-1]
    marks = np.zeros(length, dtype=int)
    marks[starts] = 1
    return np.cumsum(marks) % 2 == 1


def test_tokens_are_dropped_as_often_as_in_the_published_procedure():
    config, count = config_of(rate=0.2), 4000
    lengths = config.spans(48)
    window = np.arange(2, 2 + lengths.window)
    assert window[-1] < V
    _, batch = batch_of(config, 48, np.tile(window, (count, 1)))
    # Tokens are their own places, so the targets tell which were dropped.
    dropped = np.stack([np.isin(window, row) for row in batch.targets.numpy()])
    generator = np.random.default_rng(0)
    reference = np.stack(
        [published_mask(lengths.window, 0.2, 3.0, generator) for _ in range(count)]
    )
    assert (dropped.sum(axis=1) == reference.sum(axis=1)).all()
    for one, two in (
        (dropped, reference),
        (dropped[:, 1:] & dropped[:, :-1], reference[:, 1:] & reference[:, :-1]),
        (dropped[:, 5:] & dropped[:, :-5], reference[:, 5:] & reference[:, :-5]),
    ):
        share = (one.mean(axis=0) + two.mean(axis=0)) / 2
        error = (2 * share * (1 - share) / count) ** 0.5
        assert (np.abs(one.mean(axis=0) - two.mean(axis=0)) <= 4.5 * error).all()


# ---- documents


def test_documents_follow_their_tokens_and_spans():
    config = config_of(document_mask=True, rate=0.3, mean_span=2.0)
    generator = np.random.default_rng(0)
    window = config.window(40).length
    windows = np.where(
        generator.random((60, window)) < 0.1, EOT, generator.integers(2, V, (60, window))
    )
    windows, batch = batch_of(config, 40, windows)
    for row, tokens in enumerate(windows.tolist()):
        document, of_token = 1, []
        for token in tokens:
            of_token.append(document)
            document += token == EOT
        # Walk through the encoder's text, and through the window beside it.
        at, of_span, expected = 0, [], []
        spans = spans_of(batch, row)
        for token in batch.encoder_inputs[row].tolist()[:-1]:
            expected.append(of_token[at])
            if is_sentinel(token):
                of_span.append(of_token[at])
                at += len(spans[FIRST - token])
            else:
                at += 1
        assert at == window
        expected.append(of_token[-1])
        assert batch.encoder_document_ids[row].tolist() == expected
        decoder = [of_span[0]]
        for span, number in zip(spans, of_span, strict=True):
            decoder += [number] * (1 + len(span))
        assert batch.document_ids[row].tolist() == decoder
        # Whatever a document's decoder tokens look for is there.
        assert set(decoder) <= set(expected)
    assert batch.encoder_document_ids.max() > 3


def test_rows_that_fill_a_batch_are_padding():
    config = config_of(document_mask=True)
    _, batch = batch_of(config, 40, count=2, num_rows=4)
    assert batch.sample_ids.tolist() == [0, 1, PADDING_ID, PADDING_ID]
    assert not batch.loss_mask[2:].any()
    assert not batch.document_ids[2:].any()
    assert not batch.encoder_document_ids[2:].any()
    _, empty = batch_of(config, 40, count=0, num_rows=3)
    for name in ("inputs", "targets", "encoder_inputs", "encoder_document_ids", "document_ids"):
        assert getattr(empty, name).shape == (3, *getattr(batch, name).shape[1:])
        assert not getattr(empty, name).any()


# ---- purity


def test_rows_are_functions_of_seed_and_number():
    config = config_of()
    windows, whole = batch_of(config, 40, count=9)
    for row in range(9):
        _, alone = batch_of(config, 40, windows[row : row + 1], first=row)
        assert alone.encoder_inputs[0].tolist() == whole.encoder_inputs[row].tolist()
        assert alone.targets[0].tolist() == whole.targets[row].tolist()
    for other in ({"seed": 4}, {"first": 9}, {"fixed": True}):
        changed = batch_of(config, 40, windows, **other)[1]
        assert changed.targets.tolist() != whole.targets.tolist()
    one, two = (batch_of(config, 40, windows, seed=seed, fixed=True)[1] for seed in (1, 2))
    assert one.targets.tolist() == two.targets.tolist()


def test_a_window_that_comes_again_is_corrupted_in_another_way():
    config = config_of()
    window = np.random.default_rng(0).integers(2, V, config.window(64).length)
    _, batch = batch_of(config, 64, [window] * 40)
    assert len({tuple(row) for row in batch.targets.tolist()}) == 40
