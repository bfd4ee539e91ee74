"""Orders without state: which sample comes i-th is computed, never stored or replayed.

Both orders below are pure functions of a few integers, so a run resumes from one number
(`consumed_samples`) in any layout: there is no shuffle buffer to save and none to lose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

BLEND_BLOCK = 65_536
"""Samples in which a blend keeps its proportions exactly."""


def splitmix64(value: int) -> int:
    """Mix 64 bits: the output function of the SplitMix64 generator (Steele et al., OOPSLA 2014).

    Args:
        value: any integer; taken modulo 2**64.

    Returns:
        A well mixed integer in [0, 2**64); a bijection of the 64-bit integers.
    """
    z = (value + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def splitmix64_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply `splitmix64` to every element.

    Args:
        values: uint64, any shape.

    Returns:
        A new uint64 array of the same shape.
    """
    z = values + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """Combine integers (seed, source, epoch, ...) into one key; their order matters.

    Args:
        parts: any integers, each taken modulo 2**64.

    Returns:
        A key in [0, 2**64) that is a pure function of the parts.
    """
    key = 0
    for part in parts:
        key = splitmix64(key ^ splitmix64(part))
    return key


class FeistelPermutation:
    """A keyed permutation of 0..n-1 that is evaluated at one point in constant time and memory.

    Generalised Feistel network on Z_a x Z_b with a = ceil(sqrt(n)) and a*b >= n, made a
    permutation of exactly n points by cycle walking (Black and Rogaway, "Ciphers with arbitrary
    finite domains", CT-RSA 2002). Fewer than a of the a*b points lie outside, so walks are rare.

    Attributes:
        n: number of points.
        key: which permutation.
    """

    # Eight rounds leave measurable bias for a handful of points, sixteen do not.
    ROUNDS = 16

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one point, got n = {n}")
        self.n = n
        self.key = key
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._round_keys = tuple(derive_key(key, r) for r in range(self.ROUNDS))

    def __call__(self, index: int) -> int:
        """Return the image of `index`.

        Args:
            index: 0 <= index < n.

        Returns:
            A number in [0, n); different for different indices.
        """
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} is outside the permutation of {self.n} points")
        point = self._network(index)
        while point >= self.n:
            point = self._network(point)
        return point

    def many(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the images of many indices at once.

        Args:
            indices: integers in [0, n), any shape.

        Returns:
            int64, same shape; element by element what calling the permutation gives.
        """
        points = np.asarray(indices, dtype=np.int64)
        if points.size and (points.min() < 0 or points.max() >= self.n):
            raise IndexError(f"an index is outside the permutation of {self.n} points")
        flat = self._network_array(points.reshape(-1).astype(np.uint64))
        while (outside := np.flatnonzero(flat >= np.uint64(self.n))).size:
            flat[outside] = self._network_array(flat[outside])
        return flat.astype(np.int64).reshape(points.shape)

    def _network(self, point: int) -> int:
        right, left = divmod(point, self._a)
        for r, key in enumerate(self._round_keys):
            if r % 2:
                right = (right + splitmix64(key ^ left)) % self._b
            else:
                left = (left + splitmix64(key ^ right)) % self._a
        return left + self._a * right

    def _network_array(self, points: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        a, b = np.uint64(self._a), np.uint64(self._b)
        right, left = points // a, points % a
        for r, key in enumerate(self._round_keys):
            # The hash is reduced before the addition: a 64-bit sum could wrap, the scalar cannot.
            if r % 2:
                right = (right + splitmix64_array(np.uint64(key) ^ left) % b) % b
            else:
                left = (left + splitmix64_array(np.uint64(key) ^ right) % a) % a
        return left + a * right


def blend_counts(weights: Sequence[float], block: int = BLEND_BLOCK) -> tuple[int, ...]:
    """Divide a block of samples among sources (largest remainder).

    Args:
        weights: relative weights, each > 0; they need not sum to 1.
        block: number of samples to divide.

    Returns:
        One count for each source, each at least 1, with sum `block`.

    Raises:
        ValueError: no weights, a weight that is not positive and finite, or one so small that its
            source would not get a single sample of the block.
    """
    if not weights or any(not (math.isfinite(w) and w > 0) for w in weights):
        raise ValueError(f"weights must be positive and finite numbers, got {list(weights)}")
    total = math.fsum(weights)
    shares = [w / total * block for w in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: (counts[s] - shares[s], s))
    for s in by_remainder[: block - sum(counts)]:
        counts[s] += 1
    if 0 in counts:
        weight = weights[counts.index(0)]
        raise ValueError(
            f"weight {weight} is {weight / total:.2g} of the blend: less than one sample in "
            f"{block:,}; raise it or leave the source out"
        )
    return tuple(counts)


class BlendOrder:
    """Interleaves sources in fixed proportions: sample i -> (source, index within the source).

    Every block of `BLEND_BLOCK` samples holds exactly `counts[s]` samples of source s, spread
    evenly (sample k of source s stands at (k + phase_s) / counts[s] of the block), so that every
    prefix, hence every global batch, has the wanted proportions up to a few samples. Each source
    is read in its own order 0, 1, 2, ... without gaps: its epochs are exact. There is nothing
    random here: what is random is the order inside each source.

    Attributes:
        counts: samples of each source in one block.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = blend_counts(weights)
        when, source, rank = [], [], []
        for s, count in enumerate(self.counts):
            # Sources of equal weight would tie everywhere without a phase of their own.
            phase = (derive_key(s) >> 32) / 2**32
            steps = np.arange(count)
            when.append((steps + phase) / count)
            source.append(np.full(count, s))
            rank.append(steps)
        order = np.argsort(np.concatenate(when), kind="stable")
        self._source = np.concatenate(source)[order].astype(np.int32)
        self._rank = np.concatenate(rank)[order].astype(np.int32)

    def __call__(self, index: int) -> tuple[int, int]:
        """Return where sample `index` comes from.

        Args:
            index: position in the blended order, >= 0 (there is no end).

        Returns:
            (source, index within the source); the latter grows without end, over all epochs.
        """
        if index < 0:
            raise IndexError(f"sample {index}: the blended order begins at 0")
        block, slot = divmod(index, BLEND_BLOCK)
        source = int(self._source[slot])
        return source, block * self.counts[source] + int(self._rank[slot])

    def position(self, source: int, index: int) -> int:
        """Return at which position of the blended order a sample of a source comes (inverse).

        Args:
            source: number of the source.
            index: index within the source, over all epochs.

        Returns:
            The i for which `self(i) == (source, index)`.
        """
        block, rank = divmod(index, self.counts[source])
        slots = np.flatnonzero(self._source == source)
        return block * BLEND_BLOCK + int(slots[rank])
