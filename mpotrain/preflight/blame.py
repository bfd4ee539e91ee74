"""Which node is bad, when all that can be seen is which pairs of nodes work (no torch).

A collective over all nodes that hangs or crawls tells nothing about the culprit. All-reduces of
pairs do: a pair that works clears both of its nodes, and a node that fails with a cleared partner
is bad. Neighbours on a ring give every node two partners in two rounds (three for an odd number),
in which all pairs run at once; only if that leaves doubts are more pairs tried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Blame:
    """What tried pairs say of their nodes.

    Attributes:
        good: nodes that worked with another node.
        bad: nodes that worked with none and failed with a good one.
        unsure: nodes that worked with none, and failed only with such as they are.
        links: failed pairs of two good nodes: the way between them is bad.
    """

    good: frozenset[int]
    bad: frozenset[int]
    unsure: frozenset[int]
    links: tuple[Pair, ...]


def ring_rounds(nodes: Sequence[int]) -> list[list[Pair]]:
    """Return the rounds in which every node meets its two neighbours on a ring.

    Args:
        nodes: numbers of the nodes, in the order of the ring.

    Returns:
        Rounds of disjoint pairs: none for a single node, one for two nodes, else two, or three
        for an odd number.
    """
    size = len(nodes)
    if size < 2:
        return []
    steps = [(nodes[i], nodes[(i + 1) % size]) for i in range(size)]
    if size == 2:
        return [steps[:1]]
    even = size - size % 2
    rounds = [steps[0:even:2], steps[1:even:2]]
    return rounds if size % 2 == 0 else [*rounds, steps[even:]]


def blame(passed: Iterable[Pair], failed: Iterable[Pair]) -> Blame:
    """Find the bad nodes.

    Args:
        passed: pairs whose all-reduce was right and fast enough.
        failed: pairs whose all-reduce was not.
    """
    failed = list(failed)
    good = frozenset(node for pair in passed for node in pair)
    bad: set[int] = set()
    doubtful: set[int] = set()
    for pair in failed:
        for node, other in (pair, pair[::-1]):
            if node not in good:
                (bad if other in good else doubtful).add(node)
    links = tuple(pair for pair in failed if good.issuperset(pair))
    return Blame(good, frozenset(bad), frozenset(doubtful - bad), links)


def further_pairs(state: Blame, tried: Collection[Pair]) -> list[Pair]:
    """Return disjoint pairs that were not tried and would clear doubts; empty if none would.

    Args:
        state: what the pairs so far say.
        tried: the pairs so far.
    """
    done = {frozenset(pair) for pair in tried}
    found: list[Pair] = []
    used: set[int] = set()
    # A good partner decides at once; two doubtful nodes that work together clear each other.
    partners = [*sorted(state.good), *sorted(state.unsure)]
    for node in sorted(state.unsure):
        if node in used:
            continue
        for other in partners:
            if other != node and other not in used and frozenset((node, other)) not in done:
                found.append((node, other))
                used |= {node, other}
                break
    return found
