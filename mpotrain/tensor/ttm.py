"""The shape rule of the published TTM GPT-2 (Chekalina et al. 2023, arXiv 2306.02697), torch-free.

Given a rank, the rule chooses the modes, the number of cores and the bonds of a layer. Published
parameter counts follow from it exactly, its peculiarity included: bonds are never reduced from the
right, so that the one next to a small last core may be larger than it can usefully be.
"""

from __future__ import annotations

from itertools import zip_longest

from mpotrain.errors import SpecError


def ttm_shape(
    in_features: int, out_features: int, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the in modes, out modes and bonds that the published rule gives a layer.

    The rule: (1) enlarge both sizes to numbers with the prime factors 2 and 3 alone; (2) pair
    their prime factors in increasing order, ones filling the shorter list; (3) from the left,
    multiply at least two pairs into a core and close it once i*j >= rank; (4) every bond is
    `rank`. (The publication lowers bonds that the cores to their left cannot fill; with (3) there
    are none.)

    Args:
        in_features: rows of W.
        out_features: columns of W.
        rank: bond dimension, and the least i*j of every core but the last.

    Raises:
        SpecError: sizes or rank below 1, or a rank so large that a single core would remain.
    """
    sizes = {"in_features": in_features, "out_features": out_features, "rank": rank}
    for name, value in sizes.items():
        if value < 1:
            raise SpecError(f"{name} is {value}; it must be a whole number of at least 1")
    primes_in = _prime_factors(_enlarge(in_features))
    primes_out = _prime_factors(_enlarge(out_features))
    in_modes, out_modes = _group(list(zip_longest(primes_in, primes_out, fillvalue=1)), rank)
    if len(in_modes) < 2:
        raise SpecError(
            f"rank {rank} leaves a single core for a {in_features} x {out_features} matrix; "
            "a TTM needs at least 2: lower the rank"
        )
    return tuple(in_modes), tuple(out_modes), (rank,) * (len(in_modes) - 1)


def _enlarge(size: int) -> int:
    """Return the nearest size' >= size = 2^a 3^b with at most ceil(log2 size) prime factors."""
    most_factors = (size - 1).bit_length()
    candidates = (
        (1 << twos) * int(3**threes)
        for threes in range(most_factors + 1)
        for twos in range(most_factors + 1 - threes)
    )
    return min(candidate for candidate in candidates if candidate >= size)


def _prime_factors(size: int) -> list[int]:
    """Return the factors of a number of the form 2^a 3^b in increasing order."""
    factors = []
    for prime in (2, 3):
        while size % prime == 0:
            factors.append(prime)
            size //= prime
    return factors


def _group(pairs: list[tuple[int, int]], rank: int) -> tuple[list[int], list[int]]:
    """Multiply neighbouring pairs into cores of i*j >= rank, at least two pairs to a core."""
    in_modes: list[int] = []
    out_modes: list[int] = []
    i, j, taken = 1, 1, 0
    for index, (factor_in, factor_out) in enumerate(pairs):
        i, j, taken = i * factor_in, j * factor_out, taken + 1
        if (taken > 1 and i * j >= rank) or index == len(pairs) - 1:
            in_modes.append(i)
            out_modes.append(j)
            i, j, taken = 1, 1, 0
    return in_modes, out_modes
