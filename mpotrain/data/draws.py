"""Random numbers that are functions of counters: of a seed, a sample's number and a purpose.

What is masked in a sample must depend neither on the rank that reads it, nor on its micro-batch,
nor on the version of a library, so there is no generator with a state: draw j of a stream is the
j-th output of SplitMix64 started at the stream's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from mpotrain.data.order import derive_key, splitmix64_array
from mpotrain.data.stream import SPLITS, Split


class Purpose(IntEnum):
    """What a stream of random numbers decides; another number means other masks for old runs."""

    CUT = 1
    """Where a text is cut in two segments."""
    SWAP = 2
    """Whether they are swapped."""
    CHOICE = 3
    """Which tokens or words are predicted."""
    REPLACEMENT = 4
    """What becomes of a predicted token."""
    RANDOM_TOKEN = 5
    """Which token takes its place."""
    DROPPED = 6
    """How dropped tokens are divided among spans."""
    KEPT = 7
    """How kept tokens are divided between spans."""


_STEP = np.uint64(0x9E3779B97F4A7C15)
_TRAINING = derive_key(*b"mpotrain objective")
# A constant of its own: evaluation sees the same masks whatever the seed of a run is.
_FIXED = derive_key(*b"mpotrain fixed objective")


def sample_keys(
    seed: int, split: Split, numbers: Sequence[int], *, fixed: bool
) -> npt.NDArray[np.uint64]:
    """Return one key for each sample.

    Args:
        seed: data.seed; without effect on fixed samples.
        split: which documents the samples are of.
        numbers: numbers of the samples in the endless training order, or in the fixed order.
        fixed: numbers count in the fixed order of evaluation.

    Returns:
        uint64 (n,): pure functions of the arguments, different for every number.
    """
    part = SPLITS.index(split)
    base = derive_key(_FIXED, part) if fixed else derive_key(_TRAINING, seed, part)
    return splitmix64_array(np.uint64(base) ^ splitmix64_array(np.array(numbers, dtype=np.uint64)))


def bits(keys: npt.NDArray[np.uint64], purpose: Purpose, count: int) -> npt.NDArray[np.uint64]:
    """Draw 64 random bits `count` times for every key.

    Args:
        keys: uint64 (n,), see `sample_keys`.
        purpose: what for; the streams of two purposes are independent.
        count: draws for each key; the first ones do not depend on how many there are.

    Returns:
        uint64 (n, count).
    """
    starts = splitmix64_array(keys ^ np.uint64(derive_key(purpose)))
    return splitmix64_array(starts[:, None] + np.arange(count, dtype=np.uint64) * _STEP)


def uniform(keys: npt.NDArray[np.uint64], purpose: Purpose, count: int) -> npt.NDArray[np.float64]:
    """Draw uniformly from [0, 1), multiples of 2**-53: float64 (n, count); see `bits`."""
    return (bits(keys, purpose, count) >> np.uint64(11)) / 2.0**53
