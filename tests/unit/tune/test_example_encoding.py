"""From texts to rows of tokens: marks, types, padding, and which tokens give way."""

import itertools

import numpy as np

from mpotrain.data.tokenizer import IdentityTokenizer
from mpotrain.tune.encoding import ExampleEncoder, kept_tokens

CLS, SEP = 90, 91


def encoder(length: int, *, types: int = 2) -> ExampleEncoder:
    return ExampleEncoder(
        IdentityTokenizer(80),
        cls_id=CLS,
        sep_id=SEP,
        sequence_length=length,
        num_token_types=types,
    )


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Drop one token after the other, as the reference implementations do."""
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


def test_truncation_is_that_of_dropping_single_tokens() -> None:
    for first, second, room in itertools.product(range(12), range(12), range(2, 14)):
        assert kept_tokens(first, second, room) == longest_first(first, second, room)


def test_one_text() -> None:
    ids, types, real = encoder(6).rows([("1 2", None), ("1 2 3 4 5 6", None), ("", None)])
    assert ids.tolist() == [
        [CLS, 1, 2, SEP, 0, 0],
        [CLS, 1, 2, 3, 4, SEP],
        [CLS, SEP, 0, 0, 0, 0],
    ]
    assert real.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]
    assert not types.any()
    assert ids.dtype == types.dtype == real.dtype == np.int64


def test_two_texts() -> None:
    ids, types, real = encoder(8).rows([("1", "2 3"), ("1 2 3 4", "5 6 7")])
    assert ids.tolist() == [
        [CLS, 1, SEP, 2, 3, SEP, 0, 0],
        [CLS, 1, 2, 3, SEP, 5, 6, SEP],
    ]
    assert types.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]]
    assert real.sum(axis=1).tolist() == [6, 8]


def test_an_encoder_without_second_type_gets_none() -> None:
    assert not encoder(8, types=1).rows([("1", "2 3")])[1].any()
