"""The pre-flight on a real SLURM: nodes whose disk is full, clock is wrong, cable is cut."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from slurm.lab_fixture import SlurmLab
from slurm.scenario import full

ROOT = Path(__file__).resolve().parents[2]
ONE_STEP = """#!/bin/bash
exec srun --kill-on-bad-exit=0 --wait=0 --no-kill "$@"
"""
STEP_FOR_EACH_NODE = """#!/bin/bash
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    srun --nodes=1 --ntasks="$TASKS" --nodelist="$node" --overlap --kill-on-bad-exit=0 "$@" &
    steps+=($!)
done
code=0
for step in "${steps[@]}"; do wait "$step" || code=$?; done
exit "$code"
"""
COMMAND = """
import os, sys, time
from pathlib import Path
node, meeting_point = os.environ["SLURMD_NODENAME"], Path(os.environ["MEETING_POINT"])
{fault}
from mpotrain.cli import entry
entry()
"""
CLOCK_OF_NODE3_IS_LATE = """
from mpotrain.preflight import clock
if node == "node3":
    clock.wall_time = lambda: time.time() - 100
"""
WAITS_BEFORE_ALL_REDUCE = """
from mpotrain.preflight import member
all_reduce = member.all_reduce_speed
def when_told(*arguments):
    (meeting_point / node).touch()
    while not (meeting_point / "go").exists():
        time.sleep(0.05)
    return all_reduce(*arguments)
member.all_reduce_speed = when_told
"""


class Preflight:
    """A pre-flight as a job of the lab."""

    def __init__(self, lab: SlurmLab, folder: Path) -> None:
        self.lab = lab
        self.out = folder / "out"
        self.log = folder / "log"
        self.folder = folder

    def submit(
        self,
        script: str,
        nodes: int,
        tasks: int,
        options: Sequence[str],
        fault: str = "",
        **env: str,
    ) -> str:
        """Submit the job and return its id."""
        path = self.folder / "job.sh"
        path.write_text(script)
        shown = self.lab.run(["scontrol", "-o", "show", "node", "node1"]).stdout
        address = re.search(r"NodeAddr=(\S+)", shown)
        assert address is not None
        variables = {
            "MASTER_ADDR": address[1],
            "MASTER_PORT": str(21_000 + os.getpid() % 9000),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "MEETING_POINT": str(self.folder),
            "TASKS": str(tasks),
        }
        shape = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--no-kill", "--no-requeue"]
        nodelist = ",".join(f"node{k + 1}" for k in range(nodes))
        return self.lab.sbatch(
            [*shape, f"--nodelist={nodelist}", f"--output={self.log}", str(path), sys.executable,
             "-c", COMMAND.format(fault=fault), "preflight", "--out", str(self.out), *options],
            variables | env, cwd=self.folder,
        )  # fmt: skip

    def end(self, job: str, seconds: float = 150.0) -> dict[str, Any]:
        """Wait for the verdict and the end of the job; return the summary."""
        path = self.out / "summary.json"
        self.lab.wait_for(path.exists, seconds, f"a verdict ({self.text()})")
        self.lab.wait_for(lambda: job not in self.lab.queue(), 60, "the end of the job")
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary

    def text(self) -> str:
        """Return the log of the job so far."""
        return self.log.read_text() if self.log.exists() else "no log"


@pytest.fixture
def preflight(fresh_lab: SlurmLab, tmp_path: Path) -> Preflight:
    return Preflight(fresh_lab, tmp_path)


@pytest.fixture
def full_disk_of_node2(fresh_lab: SlurmLab, tmp_path: Path) -> Iterator[Path]:
    """A folder that on node2 alone is a disk of 8 MiB."""
    folder = tmp_path / "local"
    folder.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=1777", "tmpfs", str(folder)]
    fresh_lab.exec("node2", small)
    yield folder
    fresh_lab.exec("node2", ["umount", "--lazy", str(folder)], check=False)


def problems(summary: dict[str, Any]) -> dict[str, str]:
    return {bad["node"]: " | ".join(bad["problems"]) for bad in summary["bad_nodes"]}


def test_good_nodes_are_good(preflight: Preflight) -> None:
    job = preflight.submit(ONE_STEP, 2, 2, ("--timeout-seconds", "90"))
    summary = preflight.end(job)
    assert summary["ok"], preflight.text()
    assert summary["num_ranks"] == 4
    (pair,) = summary["measurements"]["pairs"]
    assert pair["nodes"] == ["node1", "node2"]
    assert pair["gib_per_s"] > 0
    assert preflight.lab.job_state(job) == "COMPLETED"
    assert "pre-flight of 2 node(s), 4 rank(s): all good" in preflight.text()


def test_a_full_disk_and_a_wrong_clock_are_named(
    preflight: Preflight, full_disk_of_node2: Path
) -> None:
    job = preflight.submit(
        ONE_STEP, 3, 1, ("--timeout-seconds", "90"), CLOCK_OF_NODE3_IS_LATE,
        TMPDIR=str(full_disk_of_node2),
    )  # fmt: skip
    found = problems(preflight.end(job))
    assert set(found) == {"node2", "node3"}, preflight.text()
    assert "No space left on device" in found["node2"]
    assert "its clock is -100.0 s off" in found["node3"]
    assert preflight.lab.job_state(job) == "FAILED"


@full
def test_a_cable_cut_between_two_checks_is_named(preflight: Preflight) -> None:
    job = preflight.submit(ONE_STEP, 3, 1, ("--timeout-seconds", "60"), WAITS_BEFORE_ALL_REDUCE)
    ready = preflight.folder / "node1"
    preflight.lab.wait_for(ready.exists, 60, "the first all-reduce")
    preflight.lab.cut("node3")
    (preflight.folder / "go").touch()
    summary = preflight.end(job)
    assert set(problems(summary)) == {"node3"}, preflight.text()
    assert summary["bad_nodes"][0]["certain"] is True
    pairs = {tuple(p["nodes"]): p["error"] for p in summary["measurements"]["pairs"]}
    assert pairs["node1", "node2"] is None


@full
def test_a_cable_cut_before_the_start_is_named_by_a_step_for_each_node(
    preflight: Preflight,
) -> None:
    preflight.lab.cut("node3")
    names = "node1,node2,node3"
    start = time.monotonic()
    job = preflight.submit(
        STEP_FOR_EACH_NODE, 3, 2,
        ("--timeout-seconds", "60", "--per-node-start", "--nodes", names),
    )  # fmt: skip
    summary = preflight.end(job)
    assert time.monotonic() - start < 150
    assert set(problems(summary)) == {"node3"}, preflight.text()
    assert "did not answer" in problems(summary)["node3"]
    (pair,) = summary["measurements"]["pairs"]
    assert pair["nodes"] == ["node1", "node2"]
    assert pair["error"] is None
