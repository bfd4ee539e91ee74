"""Rows for an encoder: marks, documents, segments, and every token of the stream in its place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpotrain.batch import NO_PAIR
from mpotrain.data.collation import PADDING_ID, Samples
from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.masked import MaskedObjective
from mpotrain.data.masked_config import MaskedConfig

EOT, V = 0, 50
MASK, CLS, SEP = V, V + 1, V + 2
TOKENIZER = TokenizerEntry(kind="sentencepiece", digest="", vocab_size=V, eot_id=EOT)
ENDLESS = TokenizerEntry(kind="identity", digest="", vocab_size=V)


def objective(length: int, tokenizer=TOKENIZER, seed: int = 5, split="train", **changed):
    words = changed.pop("word_starts", None)
    config = MaskedConfig(**({"min_segment": 2} | changed))
    return MaskedObjective(
        config,
        sequence_length=length,
        seed=seed,
        split=split,
        tokenizer=tokenizer,
        word_starts=words,
    )


def batch_of(windows, length: int, num_rows: int | None = None, first: int = 0, **changed):
    fixed = changed.pop("fixed", False)
    windows = np.asarray(windows, dtype=np.int64)
    maker = objective(length, **changed)
    assert windows.shape[1:] == (maker.sample_length,)
    samples = Samples(windows, range(first, first + len(windows)), fixed)
    return maker.collate(samples, len(windows) if num_rows is None else num_rows)


def sequences_of(batch, row: int) -> list[dict]:
    """Take a row apart by its marks alone: each sequence with its segments in order of text."""
    tokens = batch.targets[row].tolist()
    starts = [place for place, token in enumerate(tokens) if token == CLS]
    ends = [place for place, token in enumerate(tokens) if token == SEP]
    found = []
    for start, limit in zip(starts, [*starts, len(tokens)][1:], strict=True):
        mine = [end for end in ends if start < end < limit]
        segments, at = [], start + 1
        for end in mine:
            segments.append(tokens[at:end])
            at = end + 1
        label = NO_PAIR if batch.pair_labels is None else int(batch.pair_labels[row, start])
        in_order = segments[::-1] if label == 1 else segments
        found.append(
            {"start": start, "stop": at, "segments": segments, "label": label,
             "text": [token for segment in in_order for token in segment]}
        )  # fmt: skip
    return found


def documents_in(window) -> list[list[int]]:
    """The texts between the ends of a window, without empty ones."""
    pieces: list[list[int]] = [[]]
    for token in window:
        if token == EOT:
            pieces.append([])
        else:
            pieces[-1].append(int(token))
    return [piece for piece in pieces if piece]


windows_of_documents = st.integers(8, 60).flatmap(
    lambda length: st.lists(
        st.one_of(st.just(EOT), *[st.integers(1, V - 1)] * 9),
        min_size=length,
        max_size=length,
    )
)


# ---- one document


def test_a_window_inside_a_document_fills_the_row():
    window = np.arange(1, 30)
    batch = batch_of([window], 32)
    (sequence,) = sequences_of(batch, 0)
    assert (sequence["start"], sequence["stop"]) == (0, 32)
    assert sequence["text"] == window.tolist()
    assert len(sequence["segments"]) == 2
    first = len(sequence["segments"][0])
    assert batch.token_types[0].tolist() == [0] * (first + 2) + [1] * (30 - first)
    assert batch.positions[0].tolist() == list(range(32))
    assert batch.document_ids[0].tolist() == [1] * 32
    assert (batch.pair_labels[0, 1:] == NO_PAIR).all()
    assert batch.pair_labels[0, 0] in (0, 1)
    assert batch.encoder_inputs is None


def test_without_pairs_there_is_one_segment_and_no_label():
    window = np.arange(1, 31)
    batch = batch_of([window], 32, pairs=False)
    assert batch.pair_labels is None
    assert not batch.token_types.any()
    (sequence,) = sequences_of(batch, 0)
    assert sequence["segments"] == [window.tolist()]


def test_marks_are_where_they_belong_in_an_example():
    window = [7, 8, 9, EOT, 10, 11, EOT, EOT, 12, 13, 14, 15, 16]
    batch = batch_of([window], 15, pairs=False)
    # The marks of two further texts take the places of three ends and of the last token.
    expected = [CLS, 7, 8, 9, SEP, CLS, 10, 11, SEP, CLS, 12, 13, 14, 15, SEP]
    assert batch.targets[0].tolist() == expected
    assert batch.document_ids[0].tolist() == [1] * 5 + [2] * 4 + [3] * 6
    assert batch.positions[0].tolist() == [*range(5), *range(4), *range(6)]


# ---- any window


@settings(max_examples=200, deadline=None)
@given(window=windows_of_documents, seed=st.integers(0, 2**40), pairs=st.booleans())
def test_the_text_of_a_window_comes_back_in_order_as_far_as_it_fits(window, seed, pairs):
    length = len(window) + (3 if pairs else 2)
    batch = batch_of([window], length, seed=seed, pairs=pairs)
    sequences, documents = sequences_of(batch, 0), documents_in(window)
    assert len(sequences) <= len(documents)
    at = 0
    for number, sequence in enumerate(sequences):
        assert sequence["start"] == at
        at = sequence["stop"]
        text, whole = sequence["text"], documents[number]
        if number < len(sequences) - 1:
            assert text == whole
        assert text == whole[: len(text)]
        span = slice(sequence["start"], at)
        assert (batch.document_ids[0, span] == number + 1).all()
        assert batch.positions[0, span].tolist() == list(range(at - sequence["start"]))
        assert (sequence["label"] == NO_PAIR) == (len(sequence["segments"]) == 1)
        if len(sequence["segments"]) == 2:
            assert pairs
            assert min(map(len, sequence["segments"])) >= 2
        elif pairs:
            room = length - sequence["start"]
            assert min(len(whole), room - 3) < 4
    # What is left of the row could not hold another sequence, or there is no text left.
    complete = sum(len(s["text"]) for s in sequences) == sum(map(len, documents))
    assert complete or length - at < 3
    assert not batch.document_ids[0, at:].any()
    assert not batch.loss_mask[0, at:].any()
    assert not batch.inputs[0, at:].any()


@settings(max_examples=200, deadline=None)
@given(
    window=windows_of_documents,
    seed=st.integers(0, 2**40),
    rate=st.floats(0.01, 0.9),
    document_mask=st.booleans(),
)
def test_marks_and_padding_are_never_masked_and_the_masks_can_be_undone(
    window, seed, rate, document_mask
):
    batch = batch_of([window], len(window) + 3, seed=seed, rate=rate, document_mask=document_mask)
    chosen, text = batch.loss_mask, batch.targets < V
    text &= batch.document_ids > 0
    assert not (chosen & ~text).any()
    assert int(chosen.sum()) == (max(1, round(rate * int(text.sum()))) if text.any() else 0)
    undone = batch.inputs.clone()
    undone[chosen] = batch.targets[chosen]
    assert undone.tolist() == batch.targets.tolist()
    # A mark is never drawn as a random token, nor is the end of a text.
    drawn = batch.inputs[chosen]
    assert not ((drawn == CLS) | (drawn == SEP) | (drawn == EOT)).any()


def test_without_document_masks_texts_share_a_document_and_positions_run_on():
    window = [7, 8, 9, EOT, 10, 11, EOT, 12, 13, 14, 15, 16, 17]
    with_mask = batch_of([window], 16)
    batch = batch_of([window], 16, document_mask=False)
    assert batch.targets.tolist() == with_mask.targets.tolist()
    assert batch.inputs.tolist() == with_mask.inputs.tolist()
    assert batch.document_ids.tolist() == (with_mask.document_ids > 0).long().tolist()
    assert batch.positions[0].tolist() == list(range(16))


def test_a_tokenizer_without_ends_gives_one_document():
    window = np.zeros(13, dtype=np.int64)
    batch = batch_of([window], 16, tokenizer=ENDLESS, document_mask=False, rate=0.3)
    assert len(sequences_of(batch, 0)) == 1
    assert int((batch.targets == 0).sum()) == 13


def test_windows_of_ends_alone_are_padding():
    batch = batch_of([[EOT] * 13], 16)
    assert batch.num_tokens == 0
    assert not batch.document_ids.any()
    assert (batch.pair_labels == NO_PAIR).all()


def test_rows_that_fill_a_batch_are_padding():
    batch = batch_of([np.arange(1, 14)], 16, num_rows=3)
    assert batch.sample_ids.tolist() == [0, PADDING_ID, PADDING_ID]
    for name in ("inputs", "targets", "loss_mask", "document_ids", "positions", "token_types"):
        field = getattr(batch, name)
        assert field.shape == (3, 16)
        assert not field[1:].any()
    assert (batch.pair_labels[1:] == NO_PAIR).all()
    empty = batch_of(np.zeros((0, 13)), 16, num_rows=2)
    assert empty.inputs.shape == (2, 16)
    assert not empty.document_ids.any()


# ---- sentence order, rates, purity


def test_half_of_the_pairs_are_swapped_and_cuts_are_uniform():
    windows = np.tile(np.arange(1, 14), (6000, 1))
    batch = batch_of(windows, 16)
    labels = batch.pair_labels[:, 0]
    assert abs(float(labels.double().mean()) - 0.5) < 4.5 * 0.5 / 6000**0.5
    cuts = []
    for row in range(6000):
        (sequence,) = sequences_of(batch, row)
        assert sequence["text"] == windows[row].tolist()
        segments = sequence["segments"][::-1] if labels[row] else sequence["segments"]
        cuts.append(len(segments[0]))
    # Where a text is cut says nothing about the order.
    assert abs(np.corrcoef(cuts, labels.numpy())[0, 1]) < 4.5 / 6000**0.5
    counts = np.bincount(cuts, minlength=12)
    assert not counts[:2].any()
    assert len(counts) == 12
    expected = 600
    # Chi-square with 9 degrees of freedom: 27.9 is the 0.1 % point.
    assert ((counts[2:] - expected) ** 2 / expected).sum() < 27.9


def test_eighty_ten_ten_over_many_rows():
    windows = np.random.default_rng(0).integers(1, V, (500, 97))
    batch = batch_of(windows, 100)
    n = batch.num_tokens
    assert n == 500 * round(0.15 * 97)
    drawn, meant = batch.inputs[batch.loss_mask], batch.targets[batch.loss_mask]
    # One random token in V - 1 is the token itself.
    same = 0.1 + 0.1 / (V - 1)
    for share, count in ((0.8, (drawn == MASK).sum()), (same, (drawn == meant).sum())):
        assert abs(int(count) - share * n) < 4.5 * (n * share * (1 - share)) ** 0.5


def test_a_sample_that_comes_again_has_another_mask_and_another_order():
    window = np.random.default_rng(0).integers(1, V, 97)
    batch = batch_of([window] * 50, 100)
    assert len({tuple(row) for row in batch.loss_mask.tolist()}) == 50
    assert set(batch.pair_labels[:, 0].tolist()) == {0, 1}


def test_rows_are_functions_of_seed_split_and_number():
    windows = np.random.default_rng(0).integers(0, V, (12, 61))
    whole = batch_of(windows, 64)
    for row in range(12):
        alone = batch_of(windows[row : row + 1], 64, num_rows=2, first=row)
        for name in ("inputs", "targets", "loss_mask", "document_ids", "pair_labels"):
            assert getattr(alone, name)[0].tolist() == getattr(whole, name)[row].tolist()
    for other in ({"seed": 6}, {"split": "validation"}, {"fixed": True}, {"first": 12}):
        assert batch_of(windows, 64, **other).inputs.tolist() != whole.inputs.tolist()
    one, two = (batch_of(windows, 64, seed=seed, fixed=True) for seed in (1, 2))
    assert one.inputs.tolist() == two.inputs.tolist()


# ---- whole words


def test_whole_words_are_masked_together_and_not_across_segments():
    starts = np.zeros(V, dtype=bool)
    starts[1::3] = True
    windows = np.random.default_rng(3).integers(0, V, (200, 61))
    batch = batch_of(windows, 64, whole_word=True, word_starts=starts, rate=0.3)
    masked = 0
    for row in range(200):
        tokens, chosen = batch.targets[row].tolist(), batch.loss_mask[row].tolist()
        before = None
        for place, token in enumerate(tokens):
            if token >= V or batch.document_ids[row, place] == 0:
                before = None
                assert not chosen[place]
                continue
            if before is not None and not starts[token]:
                assert chosen[place] == before
            before = chosen[place]
        masked += sum(chosen)
    text = int(((batch.targets < V) & (batch.document_ids > 0)).sum())
    assert 0.27 < masked / text <= 0.31


def test_whole_words_need_to_know_where_words_begin():
    with pytest.raises(ValueError, match="whole words"):
        objective(32, whole_word=True)
