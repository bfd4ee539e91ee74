"""Masks: how many, which, and what stands in their place; each row by its own key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpotrain.data.draws import Purpose, bits, sample_keys, uniform
from mpotrain.data.masking import budgets, choose_tokens, choose_words, replace
from mpotrain.data.order import derive_key, splitmix64

ROWS, T = 2000, 60


def keys_of(count: int, seed: int = 0) -> np.ndarray:
    return sample_keys(seed, "train", range(count), fixed=False)


def text_of(rows: int, length: int, share: float = 0.8) -> np.ndarray:
    return np.random.default_rng(1).random((rows, length)) < share


# ---- draws


def test_draws_are_the_outputs_of_splitmix64():
    keys = keys_of(3)
    drawn = bits(keys, Purpose.CHOICE, 5)
    for row, key in enumerate(keys.tolist()):
        state = splitmix64(key ^ derive_key(Purpose.CHOICE))
        for column in range(5):
            expected = splitmix64((state + column * 0x9E3779B97F4A7C15) % 2**64)
            assert int(drawn[row, column]) == expected
    np.testing.assert_array_equal(bits(keys, Purpose.CHOICE, 3), drawn[:, :3])


def test_keys_are_functions_of_seed_split_and_number():
    def key(seed=0, split="train", number=5, fixed=False):
        return int(sample_keys(seed, split, [number], fixed=fixed)[0])

    others = {
        key(), key(seed=1), key(split="validation"), key(number=6), key(fixed=True),
        key(fixed=True, split="validation"), key(fixed=True, number=6),
    }  # fmt: skip
    assert len(others) == 7
    assert key(fixed=True, seed=1) == key(fixed=True)
    numbers = [7, 0, 10**12]
    together = sample_keys(3, "train", numbers, fixed=False)
    alone = [key(seed=3, number=number) for number in numbers]
    assert together.tolist() == alone
    assert len(sample_keys(0, "train", [], fixed=False)) == 0


def test_uniform_draws_are_uniform_and_purposes_independent():
    keys = keys_of(4000)
    cut, swap = (uniform(keys, purpose, 25) for purpose in (Purpose.CUT, Purpose.SWAP))
    counts, _ = np.histogram(cut, bins=20, range=(0, 1))
    expected = cut.size / 20
    # Chi-square with 19 degrees of freedom: 43.8 is the 0.1 % point.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8
    assert abs(np.corrcoef(cut.ravel(), swap.ravel())[0, 1]) < 4 / cut.size**0.5
    assert abs(np.corrcoef(cut[:, 0], cut[:, 1])[0, 1]) < 4 / 4000**0.5
    assert abs(np.corrcoef(cut[1:, 0], cut[:-1, 0])[0, 1]) < 4 / 3999**0.5


# ---- which tokens


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.5, 0.99])
def test_every_row_spends_its_budget_on_text(rate):
    text = text_of(ROWS, T)
    chosen = choose_tokens(text, keys_of(ROWS), rate)
    assert not (chosen & ~text).any()
    expected = [max(1, round(rate * count)) for count in text.sum(axis=1).tolist()]
    assert chosen.sum(axis=1).tolist() == expected == budgets(text, rate).tolist()


def test_rows_without_text_have_no_masks():
    text = np.zeros((2, 9), dtype=bool)
    text[1, 4] = True
    for chosen in (
        choose_tokens(text, keys_of(2), 0.15),
        choose_words(text, text, keys_of(2), 0.15),
    ):
        np.testing.assert_array_equal(chosen, text)
    assert choose_tokens(np.zeros((0, 9), bool), keys_of(0), 0.15).shape == (0, 9)


def test_every_token_is_chosen_equally_often_and_pairs_independently():
    text = np.ones((ROWS * 5, 20), dtype=bool)
    chosen = choose_tokens(text, keys_of(ROWS * 5), 0.15)
    n, p = len(text), 3 / 20
    assert np.abs(chosen.mean(axis=0) - p).max() < 4.5 * (p * (1 - p) / n) ** 0.5
    both = (chosen[:, :-1] & chosen[:, 1:]).mean(axis=0)
    q = 3 / 20 * 2 / 19
    assert np.abs(both - q).max() < 4.5 * (q * (1 - q) / n) ** 0.5


def test_a_row_depends_on_its_own_key_alone():
    text, keys = text_of(30, T), keys_of(30)
    together = choose_tokens(text, keys, 0.15)
    words = choose_words(text, text, keys, 0.15)
    for row in range(30):
        part = slice(row, row + 1)
        np.testing.assert_array_equal(choose_tokens(text[part], keys[part], 0.15), together[part])
        alone = choose_words(text[part], text[part], keys[part], 0.15)
        np.testing.assert_array_equal(alone, words[part])
    assert (choose_tokens(text, keys_of(30, seed=1), 0.15) != together).any(axis=1).all()


# ---- whole words


def words_of(text: np.ndarray, begins: np.ndarray) -> list[list[int]]:
    """The words of one row by definition."""
    words: list[list[int]] = []
    for place in np.flatnonzero(text):
        if begins[place] or not words:
            words.append([])
        words[-1].append(int(place))
    return words


@settings(max_examples=200, deadline=None)
@given(
    bits_of_text=st.lists(st.booleans(), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
    rate=st.floats(0.01, 0.99),
)
def test_words_are_masked_whole_and_within_the_budget(bits_of_text, seed, rate):
    text = np.array([bits_of_text])
    begins = text & (np.random.default_rng(seed).random(text.shape) < 0.4)
    if text.any():
        begins[0, np.flatnonzero(text[0])[0]] = True
    chosen = choose_words(text, begins, keys_of(1, seed), rate)
    words = words_of(text[0], begins[0])
    assert not (chosen & ~text).any()
    taken = [word for word in words if chosen[0, word].any()]
    assert all(chosen[0, word].all() for word in taken)
    left = int(budgets(text, rate)[0]) - int(chosen.sum())
    lengths = [len(word) for word in words if word not in taken]
    if left < 0:
        # Nothing fitted at all: one word goes beyond the budget, and every word would.
        assert len(taken) == 1
        assert min(map(len, words)) > left + len(taken[0])
    else:
        assert not any(length <= left for length in lengths)
    assert taken or not text.any()


def test_words_of_single_tokens_spend_the_same_budget_as_tokens():
    text = text_of(ROWS, T)
    chosen = choose_words(text, text, keys_of(ROWS), 0.15)
    np.testing.assert_array_equal(chosen.sum(axis=1), budgets(text, 0.15))


# ---- what stands in their place


@pytest.mark.parametrize("shares", [(0.8, 0.1), (0.5, 0.5), (1.0, 0.0), (0.0, 0.0)])
def test_shares_of_masks_random_tokens_and_kept_ones(shares):
    rows, length, mask = 400, 100, 500
    tokens = np.zeros((rows, length), dtype=np.int64)
    chosen = np.random.default_rng(2).random(tokens.shape) < 0.5
    vocabulary = np.arange(1, 400)
    inputs = replace(tokens, chosen, keys_of(rows), mask=mask, shares=shares, vocabulary=vocabulary)
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    assert not tokens.any()
    n = int(chosen.sum())
    found = inputs[chosen]
    for share, count in (
        (shares[0], (found == mask).sum()),
        (shares[1], ((found > 0) & (found < 400)).sum()),
        (1 - sum(shares), (found == 0).sum()),
    ):
        assert abs(count - share * n) <= 4.5 * (n * share * (1 - share)) ** 0.5
    if shares[1]:
        random_ids = found[(found > 0) & (found < 400)]
        counts = np.bincount(random_ids, minlength=400)[1:]
        expected = len(random_ids) / 399
        # Chi-square with 398 degrees of freedom: 490 is beyond the 0.1 % point (489).
        assert ((counts - expected) ** 2 / expected).sum() < 490
        assert set(random_ids.tolist()) <= set(vocabulary.tolist())
