"""The verdict on made-up measurements: who is named, how surely, and with which words."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpotrain.preflight.facts import (
    ClockFacts,
    DiskFacts,
    GpuFacts,
    GroupFacts,
    NodeFacts,
    RankFacts,
    WorldFacts,
)
from mpotrain.preflight.options import PreflightOptions
from mpotrain.preflight.text import describe, summary_of
from mpotrain.preflight.verdict import Verdict, judge

OPTIONS = PreflightOptions(out=Path("/shared/run"))
GOOD_PAIRS = ((0, 1), (1, 2), (2, 0))


def gpu(uuid: str, **values: Any) -> GpuFacts:
    return replace(GpuFacts(uuid, "H200", 139.8, 139.0, 700.0), **values)


def node(number: int, **values: Any) -> NodeFacts:
    """A node without fault: one rank, two GPUs, fast disk, right clock."""
    rank = RankFacts(
        number,
        f"GPU-{number}-0",
        (gpu(f"GPU-{number}-0"), gpu(f"GPU-{number}-1")),
        (
            DiskFacts("run folder", "/shared/run", 900.0, 800.0),
            DiskFacts("temporary folder", "/tmp", 50.0, 900.0),
        ),
        {"torch": "2.9.0", "git commit": "abc"},
    )
    inner = {k: values.pop(k) for k in list(values) if k in RankFacts.__dataclass_fields__}
    if "ranks" not in values:
        values["ranks"] = (replace(rank, **inner),)
    facts = NodeFacts(
        number, f"node{number}", 1, 1, (), ClockFacts(0.01 * number, 0.001), seen=True
    )
    return replace(facts, **values)


def world(*nodes: NodeFacts, **values: Any) -> WorldFacts:
    found = list(nodes) + [node(n) for n in range(len(nodes), 3)]
    pairs = tuple(GroupFacts(pair, 10.0) for pair in GOOD_PAIRS)
    return replace(WorldFacts(tuple(found), (), pairs, GroupFacts((0, 1, 2), 9.0)), **values)


def named(verdict: Verdict) -> dict[str, bool]:
    return {bad.node: bad.certain for bad in verdict.bad_nodes}


def words(verdict: Verdict, number: int) -> str:
    return " | ".join(next(bad.problems for bad in verdict.bad_nodes if bad.number == number))


def test_a_good_world_is_good() -> None:
    verdict = judge(world(), OPTIONS)
    assert verdict == Verdict()
    assert verdict.ok


@pytest.mark.parametrize(
    ("values", "options", "text"),
    [
        ({"met": 0, "ranks": ()}, {}, "did not answer within 105 s"),
        ({"met": 1, "num_ranks": 4}, {}, "only 1 of its 4 ranks answered"),
        ({"silent": "the disk check"}, {}, "stopped answering during: the disk check"),
        ({"met": 0, "ranks": (), "unreachable": "No route"}, {}, "No route; other nodes could"),
        ({"met": 0, "ranks": (), "broken": "no torch"}, {}, "no torch; exclude it"),
        ({"errors": ("the driver hangs",)}, {}, "the driver hangs"),
        ({"seen": False}, {}, "node0 does not see it there: mount the same file system"),
        ({"gpus": ()}, {}, "GPUs: 0 here, 2 on the other nodes"),
        ({"gpus": (gpu("a"),)}, {"expect_gpus": 2}, "has 1 GPU(s), expected 2"),
        (
            {"gpus": (gpu("a"), gpu("b", error="3 elements wrong"))},
            {},
            "GPU b (H200) is broken: 3 elements wrong",
        ),
        (
            {"gpus": (gpu("a"), gpu("b", free_gib=60.0))},
            {"min_gpu_gib": 100},
            "60.0 of 139.8 GiB free, 100 are needed",
        ),
        (
            {"disks": (DiskFacts("run folder", "/r", 3.0, 800.0),)},
            {"min_free_gib": 10},
            "run folder /r: 3.0 GiB free, 10 are needed",
        ),
        (
            {"disks": (DiskFacts("run folder", "/r", 900.0, 4.0),)},
            {"min_write_mib_per_s": 10},
            "writes 4.0 MiB/s, 10 are needed",
        ),
        (
            {"disks": (DiskFacts("temporary folder", "/t", 0.0, None, "No space left"),)},
            {},
            "temporary folder /t: No space left",
        ),
        ({"clock": ClockFacts(-7.5, 0.01)}, {}, "its clock is -7.5 s off"),
        ({"versions": {"torch": "2.8.0"}}, {}, "torch: 2.8.0 here, 2.9.0 on the other nodes"),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_one_fault_names_one_node_for_sure(
    values: dict[str, Any], options: dict[str, Any], text: str, number: int
) -> None:
    nodes = [node(n, **(values if n == number else {})) for n in range(3)]
    verdict = judge(world(*nodes), replace(OPTIONS, **options))
    assert named(verdict) == {f"node{number}": True}
    assert text in words(verdict, number)
    assert not verdict.problems


def test_limits_of_zero_are_not_judged() -> None:
    disks = (DiskFacts("run folder", "/r", 0.001, 0.001),)
    slow = node(1, disks=disks, clock=ClockFacts(1e6, 0.0))
    verdict = judge(world(node(0), slow), replace(OPTIONS, max_clock_skew_seconds=0))
    assert verdict.ok
    assert "writing into the run folder from node1" in verdict.warnings[0]


def test_a_limit_is_met_by_its_own_value_and_the_uncertainty_of_clocks_counts() -> None:
    facts = world(node(0), node(1, clock=ClockFacts(5.5, 0.6)))
    limits = {"min_free_gib": 900.0, "min_write_mib_per_s": 800.0, "min_gpu_gib": 139.0}
    options = replace(OPTIONS, min_bandwidth_gib_per_s=10.0, **limits)
    assert judge(facts, options).ok
    assert not judge(world(node(0), node(1, clock=ClockFacts(5.5, 0.4))), options).ok


def test_the_first_nodes_clock_can_be_the_wrong_one() -> None:
    nodes = (node(0), node(1, clock=ClockFacts(60.0, 0.01)), node(2, clock=ClockFacts(60.1, 0.01)))
    verdict = judge(world(*nodes), OPTIONS)
    assert named(verdict) == {"node0": True}
    assert "-60.0 s off" in words(verdict, 0)


def test_two_nodes_that_contradict_each_other_are_both_suspects() -> None:
    other = node(1, clock=ClockFacts(8.0, 0.01), versions={"torch": "2.8.0"})
    pair = (GroupFacts((0, 1), None, "rank 0: timed out"),)
    verdict = judge(WorldFacts((node(0), other), (), pair), OPTIONS)
    assert named(verdict) == {"node0": False, "node1": False}
    assert "-8.0 s off that of node1" in words(verdict, 0)
    assert "+8.0 s off that of node0" in words(verdict, 1)
    assert "torch: 2.9.0 here, 2.8.0 on other nodes" in words(verdict, 0)
    assert "all-reduce with node1 failed (rank 0: timed out): one of them is bad" in words(
        verdict, 0
    )


def test_a_clock_that_was_not_compared_is_a_warning() -> None:
    verdict = judge(world(node(0), node(1, clock=None)), OPTIONS)
    assert verdict.ok
    assert verdict.warnings == ("the clock of node1 was not compared: time was up",)


def test_unknown_versions_accuse_nobody() -> None:
    assert judge(world(node(0), node(1, versions={"git commit": None})), OPTIONS).ok


def test_a_node_that_fails_with_both_neighbours_is_bad() -> None:
    pairs = (
        GroupFacts((0, 1), None, "rank 1: refused"),
        GroupFacts((1, 2), None, "rank 2: timed out"),
        GroupFacts((2, 0), 10.0),
    )
    verdict = judge(world(pairs=pairs, whole=None), OPTIONS)
    assert named(verdict) == {"node1": True}
    assert "the all-reduce with node0, node2 failed (rank 1: refused)" in words(verdict, 1)


def test_a_slow_node_is_bad_only_against_a_limit() -> None:
    pairs = (GroupFacts((0, 1), 2.0), GroupFacts((1, 2), 2.1), GroupFacts((2, 0), 10.0))
    assert judge(world(pairs=pairs), OPTIONS).ok
    verdict = judge(world(pairs=pairs), replace(OPTIONS, min_bandwidth_gib_per_s=5))
    assert named(verdict) == {"node1": True}
    assert "ran at 2 GiB/s, 5 are needed" in words(verdict, 1)
    pairs = (GroupFacts((0, 1), 2.0), GroupFacts((1, 2), 10.0), GroupFacts((2, 0), 10.0))
    assert "all-reduce between node0-node1" in judge(world(pairs=pairs), OPTIONS).warnings[0]


def test_a_bad_link_makes_both_ends_suspects() -> None:
    nodes = [node(n) for n in range(4)]
    speeds = {(0, 1): 10.0, (2, 3): 10.0, (1, 2): 0.5, (3, 0): 10.0}
    pairs = tuple(GroupFacts(pair, speed) for pair, speed in speeds.items())
    options = replace(OPTIONS, min_bandwidth_gib_per_s=5)
    verdict = judge(WorldFacts(tuple(nodes), (), pairs), options)
    assert named(verdict) == {"node1": False, "node2": False}
    assert "the way between the two is bad" in words(verdict, 2)


def test_where_no_pair_works_it_is_a_setting() -> None:
    pairs = tuple(GroupFacts(pair, None, "rank 0: refused") for pair in GOOD_PAIRS)
    verdict = judge(world(pairs=pairs, whole=None), OPTIONS)
    assert not verdict.bad_nodes
    assert "GLOO_SOCKET_IFNAME" in verdict.problems[0]
    assert not verdict.ok


def test_partners_of_a_node_that_died_are_not_accused() -> None:
    nodes = [node(n) for n in range(4)]
    nodes[2] = replace(nodes[2], silent="all-reduce of pairs of nodes, round 1")
    pairs = (GroupFacts((0, 1), 10.0), GroupFacts((2, 3), None, "rank 2: no answer"))
    verdict = judge(WorldFacts(tuple(nodes), (), pairs), OPTIONS)
    assert named(verdict) == {"node2": True}
    alone = (GroupFacts((0, 1), None, "rank 1: no answer"),)
    verdict = judge(WorldFacts((node(0), replace(node(1), silent="x")), (), alone), OPTIONS)
    assert named(verdict) == {"node1": True}


def test_a_node_that_fails_inside_and_a_world_that_fails_as_a_whole() -> None:
    inside = (GroupFacts((0,), 50.0), GroupFacts((1,), None, "rank 3: wrong sums"))
    verdict = judge(world(inside=inside), OPTIONS)
    assert named(verdict) == {"node1": True}
    assert "inside the node failed (rank 3: wrong sums)" in words(verdict, 1)
    verdict = judge(world(whole=GroupFacts((0, 1, 2), None, "rank 9: too many files")), OPTIONS)
    assert not verdict.bad_nodes
    assert "too many files" in verdict.problems[0]


def test_ranks_that_share_a_gpu_are_found() -> None:
    twice = tuple(RankFacts(r, "GPU-7", (gpu("GPU-7"), gpu("GPU-8"))) for r in (2, 3))
    verdict = judge(world(node(0), node(1, ranks=twice, num_ranks=2, met=2)), OPTIONS)
    assert named(verdict) == {"node1": True}
    assert "2 ranks share GPU GPU-7" in words(verdict, 1)


def test_several_that_cannot_reach_the_first_node_speak_against_it() -> None:
    cut = {"met": 0, "ranks": (), "unreachable": "could not reach", "seen": None}
    nodes = (node(0), node(1, **cut), node(2, **cut))
    verdict = judge(WorldFacts(nodes), OPTIONS)
    assert named(verdict) == {"node0": False}
    assert "(node1, node2)" in words(verdict, 0)
    verdict = judge(WorldFacts(nodes[:2]), OPTIONS)
    assert named(verdict) == {"node0": False, "node1": False}
    verdict = judge(WorldFacts((node(0), replace(nodes[1], broken="no torch"))), OPTIONS)
    assert named(verdict) == {"node1": True}
    # As the orphans see it: the first node is the silent one.
    gone = replace(nodes[0], met=0, ranks=())
    assert named(judge(WorldFacts((gone, *nodes[1:])), OPTIONS)) == {"node0": True}


def test_a_first_node_that_sees_no_reports_is_the_odd_one() -> None:
    nodes = (node(0), node(1, seen=False), node(2, seen=False))
    assert named(judge(world(*nodes), OPTIONS)) == {"node0": True}
    assert named(judge(WorldFacts(nodes[:2]), OPTIONS)) == {"node1": False}


def test_the_summary_says_it_in_json_and_in_lines() -> None:
    facts = world(node(0), node(1, met=0, ranks=(), clock=None))
    verdict = judge(facts, OPTIONS)
    summary = summary_of(facts, verdict, 12.34)
    assert summary["ok"] is False
    assert [bad["node"] for bad in summary["bad_nodes"]] == ["node1"]
    assert summary["measurements"]["pairs"][0] == {
        "nodes": ["node0", "node1"],
        "gib_per_s": 10.0,
        "error": None,
    }
    lines = describe(summary).splitlines()
    assert lines[0].startswith("bad node node1: did not answer within 105 s")
    assert lines[-1].startswith("pre-flight of 3 node(s), 3 rank(s): 1 node(s) named in 12.3 s")
    assert "all good" in describe(summary_of(world(), judge(world(), OPTIONS), 1.0))


def test_facts_survive_the_way_through_json() -> None:
    from mpotrain.preflight.facts import plain, rank_facts

    (rank,) = node(1, errors=("x",)).ranks
    assert rank_facts(plain(rank)) == rank
    assert dataclasses.asdict(rank_facts(plain(RankFacts(3)))) == dataclasses.asdict(RankFacts(3))
