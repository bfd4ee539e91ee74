"""Which node is bad, from pairs alone: against brute force over all sets of bad nodes."""

from __future__ import annotations

import itertools

import pytest

from mpotrain.preflight.blame import Pair, blame, further_pairs, ring_rounds


def measured(pairs: list[Pair], bad: set[int]) -> tuple[list[Pair], list[Pair]]:
    """A pair works where none of its nodes is bad."""
    failed = [pair for pair in pairs if bad & set(pair)]
    return [pair for pair in pairs if pair not in failed], failed


@pytest.mark.parametrize("size", range(9))
def test_every_node_meets_its_two_neighbours_once(size: int) -> None:
    nodes = [10 * n for n in range(size)]
    rounds = ring_rounds(nodes)
    for pairs in rounds:
        used = [node for pair in pairs for node in pair]
        assert len(used) == len(set(used))
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met))
    for i, node in enumerate(nodes):
        around = {nodes[i - 1], nodes[(i + 1) % size]} - {node}
        assert {n for pair in met if node in pair for n in pair} - {node} == around
    assert len(rounds) == (0 if size < 2 else 1 if size == 2 else 2 + size % 2)


def test_a_single_bad_node_of_three_or_more_is_found_by_the_ring_alone() -> None:
    for size in range(3, 9):
        pairs = [pair for pairs in ring_rounds(range(size)) for pair in pairs]
        for bad in range(size):
            state = blame(*measured(pairs, {bad}))
            assert state.bad == {bad}, (size, bad)
            assert not state.unsure
            assert not state.links
            assert further_pairs(state, pairs) == []


def test_sets_of_bad_nodes_are_found_while_two_good_ones_are_left() -> None:
    undecided = 0
    for size in range(4, 8):
        for number in range(size - 1):
            for chosen in itertools.combinations(range(size), number):
                bad = set(chosen)
                tried = [pair for pairs in ring_rounds(range(size)) for pair in pairs]
                for _ in range(2):
                    more = further_pairs(blame(*measured(tried, bad)), tried)
                    assert not {frozenset(p) for p in more} & {frozenset(p) for p in tried}
                    tried += more
                state = blame(*measured(tried, bad))
                assert state.bad <= bad, (size, bad)
                assert state.good <= set(range(size)) - bad
                assert bad <= state.bad | state.unsure
                undecided += state.bad != bad
                if 2 * number < size:
                    assert state.bad == bad, (size, bad)
    # Where most nodes are bad, few rounds need not find the good ones; nobody is accused wrongly.
    assert undecided < 40


def test_alternating_bad_nodes_need_further_pairs() -> None:
    tried = [pair for pairs in ring_rounds(range(4)) for pair in pairs]
    state = blame(*measured(tried, {0, 2}))
    assert state.unsure == {0, 1, 2, 3}
    assert not state.bad
    more = further_pairs(state, tried)
    assert {frozenset(pair) for pair in more} == {frozenset({0, 2}), frozenset({1, 3})}
    assert blame(*measured(tried + more, {0, 2})).bad == {0, 2}


def test_of_two_nodes_both_are_doubtful() -> None:
    state = blame([], [(4, 7)])
    assert (state.bad, state.unsure, state.links) == (frozenset(), {4, 7}, ())
    assert further_pairs(state, [(4, 7)]) == []


def test_a_bad_cable_between_good_nodes_is_a_link() -> None:
    state = blame([(0, 1), (2, 3), (3, 0)], [(1, 2)])
    assert state.links == ((1, 2),)
    assert not state.bad
    assert not state.unsure
