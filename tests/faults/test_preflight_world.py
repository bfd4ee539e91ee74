"""Pre-flights of several real processes, some of which are broken: the bad node is named."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from faults.preflight_world import ROOT, World

NODES = ("na", "nb", "nc")
ONLY_CLOCK = ("--skip=gpus", "--skip=disk", "--skip=versions")
NO_CLOCK = (*ONLY_CLOCK, "--skip=clock")
"""Where the time is short: checks that a busy machine could fail."""
LATE_CLOCK = """
import time
from mpotrain.preflight import clock
clock.wall_time = lambda: time.time() + 30
"""
STOPS_IN_ALL_REDUCE = """
import os, signal
from mpotrain.preflight import member
member.all_reduce_speed = lambda *arguments: os.kill(os.getpid(), signal.SIGSTOP)
"""
HANGS_IN_ALL_REDUCE = """
import time
from mpotrain.preflight import member
member.all_reduce_speed = lambda *arguments: time.sleep(1000)
"""
ADDS_WRONGLY = """
import torch
from mpotrain.preflight import collective
add = torch.Tensor.__add__
def wrong(left, right):
    total = add(left, right)
    if total.dtype == torch.int32 and left.numel() > 1000 and isinstance(right, int):
        total[17] += 1
    return total
torch.Tensor.__add__ = wrong
"""
DISK_HANGS = """
import time
from mpotrain.preflight import member
measure = member.measure_disk
member.measure_disk = lambda purpose, path: time.sleep(1000) if "run" in purpose else measure(purpose, path)
"""  # noqa: E501
CLOCK_HANGS = """
import time
from mpotrain.preflight import clock
clock.wall_time = lambda: time.sleep(1000)
"""
OTHER_CODE = """
from mpotrain.preflight import versions
versions.source_digest = lambda package: "0123456789abcdef"
"""
HIDES = """
from mpotrain.preflight import seat
class Elsewhere(seat.ReportFolder):
    def write(self, name, content):
        super().write(name, content)
        (self.path / name).unlink()
seat.ReportFolder = Elsewhere
"""
"""A node whose shared folder is not the shared one: what it writes is not seen by others."""


def test_two_nodes_of_two_ranks_are_good(tmp_path: Path) -> None:
    run = tmp_path / "run"
    world = World(tmp_path / "out", NODES[:2], 2, ("--run-folder", str(run))).start()
    ended = world.end()
    assert set(ended.codes.values()) == {0}, ended.errors
    assert "pre-flight of 2 node(s), 4 rank(s): all good" in ended.outs[0]
    assert not any(ended.outs[rank] for rank in (1, 2, 3))
    assert ended.summary is not None
    assert ended.named == {}
    measured = ended.summary["measurements"]
    assert [group["nodes"] for group in measured["inside"]] == [["na"], ["nb"]]
    (pair,) = measured["pairs"]
    assert pair["nodes"] == ["na", "nb"]
    assert all(group["gib_per_s"] > 0 for group in [*measured["inside"], pair])
    assert abs(measured["nodes"]["nb"]["clock"]["ahead"]) < 1
    for number, name in enumerate(NODES[:2]):
        report = json.loads((tmp_path / "out" / f"node-{name}.json").read_text())
        assert report["number"] == number
        assert [rank["rank"] for rank in report["ranks"]] == [2 * number, 2 * number + 1]
        assert len(report["collectives"]) == 2
        assert (report["ok"], report["problems"]) == (True, [])
    assert list(run.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "text"),
    [
        (LATE_CLOCK, "its clock is +30.0 s off those of the other nodes"),
        (ADDS_WRONGLY, "sums are wrong"),
        (HANGS_IN_ALL_REDUCE, "though others work together: exclude it"),
        (DISK_HANGS, "writing did not finish"),
        (OTHER_CODE, "mpotrain source: 0123456789abcdef here"),
        (HIDES, "but na does not see it there"),
    ],
    ids=["clock", "sum", "hang", "disk", "code", "folder"],
)
def test_the_bad_one_of_three_nodes_is_named(tmp_path: Path, program: str, text: str) -> None:
    options = ("--timeout-seconds", "60")
    if program == HANGS_IN_ALL_REDUCE:
        options = ("--timeout-seconds", "30", *NO_CLOCK)
    world = World(tmp_path, NODES, 1, options, {1: program}).start()
    ended = world.end()
    assert set(ended.codes.values()) == {2}, ended.errors
    assert ended.named == {"nb": True}, ended.outs
    assert text in ended.problems("nb")
    assert ended.outs[0].startswith("bad node nb: ")


def test_a_node_that_cannot_write_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    variables = {2: {"TMPDIR": str(tmp_path / "file")}}
    world = World(tmp_path / "out", NODES, 1, (), {}, variables).start()
    ended = world.end()
    assert ended.named == {"nc": True}
    assert "temporary folder" in ended.problems("nc")
    report = json.loads((tmp_path / "out" / "node-nc.json").read_text())
    assert report["ok"] is False
    assert report["problems"][0].startswith("temporary folder")


@pytest.mark.slow
def test_a_node_that_never_starts_is_named_in_bounded_time(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = World(tmp_path, NODES, 1, ("--timeout-seconds", "20", *NO_CLOCK)).start(1).end()
    assert time.monotonic() - start < 120
    assert ended.codes == {0: 2, 2: 2}
    assert ended.named == {"nb": True}
    assert "did not answer" in ended.problems("nb")
    assert ended.summary is not None
    assert [pair["nodes"] for pair in ended.summary["measurements"]["pairs"]] == [["na", "nc"]]


@pytest.mark.slow
def test_a_node_that_freezes_in_a_collective_is_named(tmp_path: Path) -> None:
    options = ("--timeout-seconds", "25", *NO_CLOCK)
    world = World(tmp_path, (*NODES, "nd"), 1, options, {2: STOPS_IN_ALL_REDUCE}).start()
    ended = world.end(alive=(0, 1, 3))
    assert ended.codes == {0: 2, 1: 2, 3: 2}
    assert ended.named == {"nc": True}
    assert "stopped answering during: all-reduce of pairs of nodes" in ended.problems("nc")


@pytest.mark.slow
def test_a_rank_that_hangs_anywhere_ends_itself(tmp_path: Path) -> None:
    start = time.monotonic()
    options = ("--timeout-seconds", "15", *ONLY_CLOCK)
    ended = World(tmp_path, NODES, 1, options, {1: CLOCK_HANGS}).start().end()
    assert time.monotonic() - start < 120
    assert ended.codes == {0: 2, 1: 2, 2: 2}
    assert ended.named == {"nb": True}
    assert "stopped answering during: comparison of clocks" in ended.problems("nb")
    assert ended.summary is not None
    assert ended.summary["measurements"]["nodes"]["nc"]["clock"] is not None
    assert "hangs in its stage: comparison of clocks" in ended.errors[1]
    report = json.loads((tmp_path / "node-nb.json").read_text())
    assert "comparison of clocks" in report["broken"]


@pytest.mark.slow
def test_a_node_that_cannot_reach_the_first_says_so(tmp_path: Path) -> None:
    # A black hole in the network as this node sees it: another address, where nobody listens.
    variables = {1: {"MASTER_PORT": "1"}}
    options = ("--timeout-seconds", "20", *NO_CLOCK)
    world = World(tmp_path, NODES, 1, options, {}, variables).start()
    ended = world.end()
    assert set(ended.codes.values()) == {2}
    assert ended.named == {"nb": True}
    expected = "could not reach the first rank at 127.0.0.1:1 in 5 s: Connection refused"
    assert expected in ended.problems("nb")
    assert "other nodes could: exclude it" in ended.problems("nb")
    assert "rank 1: error: could not reach the first rank" in ended.errors[1]


def test_a_node_without_working_libraries_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for number, name in enumerate(NODES[:2]):
        out = tmp_path / name
        variables = {number: {"PYTHONPATH": path}}
        options = ("--timeout-seconds", "15", *NO_CLOCK)
        ended = World(out, NODES[:2], 1, options, {}, variables).start().end()
        assert ended.codes == {0: 2, 1: 2}
        assert ended.named == {name: True}, ended.summary
        assert "libcudart.so.12: cannot open" in ended.problems(name)
        assert json.loads((out / f"node-{name}.json").read_text())["ok"] is False


@pytest.mark.slow
def test_without_the_first_node_the_others_write_the_summary(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = World(tmp_path, NODES, 1, ("--timeout-seconds", "12", *NO_CLOCK)).start(0).end()
    assert time.monotonic() - start < 120
    assert ended.codes == {1: 2, 2: 2}
    assert ended.named == {"na": True}
    assert "did not answer" in ended.problems("na")


def test_nodes_started_one_by_one_form_one_world(tmp_path: Path) -> None:
    alone = {
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
    }
    variables = {n: alone | {"SLURM_STEP_NODELIST": NODES[n]} for n in range(3)}
    options = ("--per-node-start", "--nodes", ",".join(NODES))
    options = (*options, "--timeout-seconds", "20", *NO_CLOCK)
    world = World(tmp_path, NODES, 1, options, {}, variables)
    ended = world.start().end()
    assert ended.named == {}, ended.errors
    assert ended.summary is not None
    assert len(ended.summary["measurements"]["pairs"]) == 3
    ended = world.start(2).end()
    assert ended.named == {"nc": True}
