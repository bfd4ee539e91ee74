"""Seeds that are pure functions of counters, so that no random state is ever saved (no torch).

Generators of torch on the CPU read the low 32 bits of a seed alone, so what tells two seeds apart
has to be mixed into all bits.
"""

from __future__ import annotations

import zlib

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def microbatch_seed(seed: int, step: int, microbatch: int) -> int:
    """Return the seed of one micro-batch's randomness (dropout, masking).

    The three counters pass one after another through the finalizer of splitmix64 (Steele, Lea,
    Flood 2014), each spread by the golden ratio first, so that neighbours in any of them share
    no structure. The result depends on no rank: any world size draws the same masks.

    Args:
        seed: seed of the run.
        step: optimizer step.
        microbatch: number of the micro-batch inside the step, over all ranks.

    Returns:
        An integer in [0, 2**63), which `torch.manual_seed` takes.
    """
    state = _mix(seed & _MASK)
    state = _mix(state ^ ((step * _GOLDEN) & _MASK))
    state = _mix(state ^ ((microbatch * _GOLDEN) & _MASK))
    return state >> 1


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


_MASK_DOMAIN = 0x63656E7472616C00
"""Keeps the draws of masks apart from the seeds of micro-batches."""


def mask_seed(seed: int, step: int, key: int) -> int:
    """Return the seed of a mask: a function of (seed, step, key) like `microbatch_seed`.

    Args:
        seed: seed of the run.
        step: optimizer step.
        key: what is masked, e.g. a digest of a tensor's name.

    Returns:
        An integer in [0, 2**63), spread evenly.
    """
    return microbatch_seed(seed ^ _MASK_DOMAIN, step, key)


def mask_uniform(seed: int, step: int, key: int) -> float:
    """Return a number in [0, 1) for (seed, step, key), the same on every rank."""
    return (mask_seed(seed, step, key) >> 10) / float(1 << 53)


_START_DOMAIN = 0x7374617274000000
"""Keeps the seeds of start weights apart from all others."""


def start_seed(seed: int, name: str) -> int:
    """Return the seed of the start values of one parameter or layer.

    Args:
        seed: seed of the run.
        name: its logical name.

    Returns:
        An integer in [0, 2**63), spread evenly.
    """
    # crc32 is stable over processes and Python versions, unlike hash().
    return microbatch_seed(seed ^ _START_DOMAIN, 0, zlib.crc32(name.encode()))
