"""How far the clocks of two nodes are apart, through a few exchanged messages (no torch).

As in NTP: the first node notes its time before and after it asks for that of another node. The
answer was given somewhere in between, so the offset is known to half of the round trip; of several
exchanges the quickest knows it best.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mpotrain.preflight.facts import ClockFacts

NUM_EXCHANGES = 5


def wall_time() -> float:
    """Return the time of this node's clock, in seconds since 1970."""
    return time.time()


def compare_clocks(ask: Callable[[int], float | None]) -> ClockFacts | None:
    """Compare this node's clock with that of another node.

    Args:
        ask: exchange k: returns the other node's time, or None if it does not answer.

    Returns:
        How far the other clock is ahead; None if the other node did not answer.
    """
    best: ClockFacts | None = None
    for number in range(NUM_EXCHANGES):
        before = wall_time()
        start = time.monotonic()
        theirs = ask(number)
        half = (time.monotonic() - start) / 2
        if theirs is None:
            return None
        if best is None or half < best.uncertainty:
            best = ClockFacts(theirs - before - half, half)
    return best
