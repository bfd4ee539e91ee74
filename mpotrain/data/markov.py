"""An order-2 Markov chain whose entropy rate is known exactly: a floor under every model's loss.

The chain and its documents are made of integers (SplitMix64 of a counter; the stationary
distribution enters rounded to 2**-32), so a seed gives the same tokens with every version of numpy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpotrain.data.order import derive_key, splitmix64_array

_TABLE, _START, _STEP = range(3)
_START_SCALE = 1 << 32
_MAX_SWEEPS = 100_000


class MarkovChain:
    """An order-2 Markov chain over a small vocabulary with rational transition probabilities.

    P(c | a, b) = table[a, b, c] / sum_c table[a, b, c] with whole numbers in the table. All are
    positive, so the chain is ergodic and its stationary distribution unique.

    Attributes:
        vocab_size: number of symbols V.
        seed: which chain.
        table: transition weights, int64 (V, V, V).
        stationary: probability of the pair (a, b) in the long run, float64 (V, V).
    """

    def __init__(self, vocab_size: int, seed: int) -> None:
        if not 2 <= vocab_size <= 256:
            raise ValueError(f"a Markov chain has 2 to 256 symbols, got {vocab_size}")
        self.vocab_size = vocab_size
        self.seed = seed
        counters = np.arange(vocab_size**3, dtype=np.uint64)
        draws = splitmix64_array(counters ^ np.uint64(derive_key(seed, _TABLE))) % np.uint64(64)
        # Sixth powers spread the weights: a context has a few likely successors. A row sums to
        # less than 2**44, so that drawing by remainder from 64 bits is even to one in a million.
        self.table = (draws.astype(np.int64) ** 6 + 1).reshape((vocab_size,) * 3)
        self.stationary = self._stationary()

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """P(c | a, b) as float64 (V, V, V)."""
        return np.asarray(self.table / self.table.sum(axis=2, keepdims=True))

    @property
    def entropy_rate(self) -> float:
        """H(X_t | X_{t-1}, X_{t-2}) in nats per token: the least loss any model can reach."""
        return float((self.stationary * _entropy(self.probabilities)).sum())

    @property
    def order_one_entropy(self) -> float:
        """H(X_t | X_{t-1}) in nats: the floor where only one token of context is visible."""
        of_pairs = _entropy(self.stationary.reshape(-1))
        of_singles = _entropy(self.stationary.sum(axis=1))
        return float(of_pairs - of_singles)

    def window_floor(self, sequence_length: int) -> float:
        """Return the least mean loss over windows that begin anywhere in the chain.

        The first of the T targets of a window is predicted from one token, all others from two
        or more.

        Args:
            sequence_length: T, number of targets of a window.

        Returns:
            Nats per token; slightly above the entropy rate.
        """
        return self.entropy_rate + (self.order_one_entropy - self.entropy_rate) / sequence_length

    def sample(self, num_documents: int, length: int, first: int = 0) -> npt.NDArray[np.int64]:
        """Draw documents; document d is a pure function of (seed, d) and begins in equilibrium.

        Args:
            num_documents: D.
            length: tokens of each document.
            first: number of the first document.

        Returns:
            Token ids, int64 (D, length).
        """
        V = self.vocab_size
        limits = np.cumsum(self.table, axis=2)
        numbers = np.arange(first, first + num_documents, dtype=np.uint64)
        starts = splitmix64_array(numbers ^ np.uint64(derive_key(self.seed, _START)))
        streams = splitmix64_array(numbers ^ np.uint64(derive_key(self.seed, _STEP)))
        cumulative = np.rint(np.cumsum(self.stationary) * _START_SCALE).astype(np.int64)
        pair = np.searchsorted(cumulative, (starts >> np.uint64(32)).astype(np.int64), side="right")
        a, b = np.divmod(np.minimum(pair, V * V - 1), V)
        tokens = np.empty((num_documents, max(length, 2)), dtype=np.int64)
        tokens[:, 0], tokens[:, 1] = a, b
        for t in range(2, length):
            row = limits[a, b]
            draw = splitmix64_array(streams + np.uint64(t)) % row[:, -1].astype(np.uint64)
            a, b = b, (row <= draw.astype(np.int64)[:, None]).sum(axis=1)
            tokens[:, t] = b
        return tokens[:, :length]

    def _stationary(self) -> npt.NDArray[np.float64]:
        """Solve pi(b, c) = sum_a pi(a, b) P(c | a, b) by power iteration."""
        V = self.vocab_size
        pairs = np.full((V, V), 1.0 / V**2)
        probabilities = self.probabilities
        for _ in range(_MAX_SWEEPS):
            before = pairs
            pairs = np.einsum("ab,abc->bc", before, probabilities)
            pairs /= pairs.sum()
            if np.abs(pairs - before).max() < 1e-15 * pairs.max():
                break
        return pairs


def _entropy(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Entropy in nats over the last axis, with 0 ln 0 = 0."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return np.asarray(-(probabilities * logs).sum(axis=-1))
