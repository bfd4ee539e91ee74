"""Which tokens are predicted, and what the network reads in their place.

Devlin et al., "BERT" (NAACL 2019), section 3.1: 15 % of the tokens; of these 80 % become the mask,
10 % a random token and 10 % stay. Whole words: the same budget, spent on all tokens of a word.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpotrain.data.draws import Purpose, bits, uniform

Flags = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.uint64]


def budgets(is_text: Flags, rate: float) -> npt.NDArray[np.int64]:
    """Return how many tokens of each row are predicted: at least one where there is text.

    Args:
        is_text: tokens that may be predicted, bool (n, T).
        rate: share of them.

    Returns:
        int64 (n,).
    """
    count: npt.NDArray[np.int64] = is_text.sum(axis=1)
    wanted: npt.NDArray[np.int64] = np.maximum(np.rint(rate * count).astype(np.int64), 1)
    return np.minimum(count, wanted)


def choose_tokens(is_text: Flags, keys: Keys, rate: float) -> Flags:
    """Choose single tokens, every set of the same size with the same probability.

    Args:
        is_text: tokens that may be predicted, bool (n, T).
        keys: key of each row, uint64 (n,).
        rate: share of them.

    Returns:
        bool (n, T), with exactly `budgets` tokens in each row.
    """
    # One bit marks what may not be chosen, so that it comes last whatever is drawn.
    draws = bits(keys, Purpose.CHOICE, is_text.shape[1]) >> np.uint64(1)
    draws[~is_text] |= np.uint64(1 << 63)
    order = np.argsort(draws, axis=1, kind="stable")
    chosen = np.zeros(is_text.shape, dtype=np.bool_)
    ranks = np.arange(is_text.shape[1]) < budgets(is_text, rate)[:, None]
    np.put_along_axis(chosen, order, ranks, axis=1)
    return chosen


def choose_words(is_text: Flags, begins: Flags, keys: Keys, rate: float) -> Flags:
    """Choose whole words in random order while they fit in the budget.

    A word that is too long for what is left is passed over; where none fits at all, the first one
    is taken.

    Args:
        is_text: tokens that may be predicted, bool (n, T).
        begins: the first token of each word, bool (n, T); a word ends before the next one, and
            the tokens between that are no text do not belong to it.
        keys: key of each row, uint64 (n,).
        rate: share of the tokens.

    Returns:
        bool (n, T).
    """
    draws = bits(keys, Purpose.CHOICE, is_text.shape[1])
    limits = budgets(is_text, rate)
    chosen = np.zeros(is_text.shape, dtype=np.bool_)
    for row, limit in enumerate(limits.tolist()):
        if limit == 0:
            continue
        places = np.flatnonzero(is_text[row])
        words = np.cumsum(begins[row, places]) - 1
        lengths = np.bincount(words)
        order = np.argsort(draws[row, : len(lengths)], kind="stable")
        taken = np.zeros(len(lengths), dtype=np.bool_)
        taken[_fitting(order.tolist(), lengths.tolist(), limit)] = True
        chosen[row, places] = taken[words]
    return chosen


def _fitting(order: list[int], lengths: list[int], limit: int) -> list[int]:
    """Return the words that are taken, in the order in which they come."""
    taken, left = [], limit
    for word in order:
        if lengths[word] <= left:
            taken.append(word)
            left -= lengths[word]
            if left == 0:
                break
    return taken or order[:1]


def replace(
    tokens: npt.NDArray[np.int64],
    chosen: Flags,
    keys: Keys,
    *,
    mask: int,
    shares: tuple[float, float],
    vocabulary: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return what the network reads: every chosen token is masked, exchanged or left alone.

    Args:
        tokens: the text, int64 (n, T).
        chosen: tokens that are predicted, bool (n, T).
        keys: key of each row, uint64 (n,).
        mask: id of the mask.
        shares: shares of the chosen tokens that become the mask and a random token.
        vocabulary: ids that a random token may have, int64 (V,).

    Returns:
        int64 (n, T), a new array.
    """
    draws = uniform(keys, Purpose.REPLACEMENT, tokens.shape[1])
    masked, exchanged = shares[0], shares[0] + shares[1]
    inputs = np.where(chosen & (draws < masked), mask, tokens)
    at_random = chosen & (draws >= masked) & (draws < exchanged)
    picks = uniform(keys, Purpose.RANDOM_TOKEN, tokens.shape[1])[at_random]
    inputs[at_random] = vocabulary[(picks * len(vocabulary)).astype(np.int64)]
    return inputs
