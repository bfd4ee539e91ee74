"""Processes that are told to be ranks on several nodes, as srun tells its tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run_process import free_port

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import sys, time
from pathlib import Path
try:
    from mpotrain.preflight import channel, collective, coordinator, member
    collective.CPU_BYTES = 2**20
    coordinator.CLOCK_SHARE = 0.4
except ImportError:
    pass  # a test has broken torch
meeting = Path({meeting!r})
(meeting / {rank!r}).touch()
while sum(1 for _ in meeting.iterdir()) < {count}:
    time.sleep(0.01)
"""
"""What takes long on a busy machine comes before the clocks begin to run, which all do at once."""


@dataclass
class World:
    """Ranks of one pre-flight.

    Attributes:
        out: folder of the reports.
        nodes: names of the nodes.
        per_node: ranks on each.
        options: of the command line.
        programs: Python text that runs before the command, by number of the node.
        variables: environment variables, by number of the node.
    """

    out: Path
    nodes: Sequence[str]
    per_node: int = 1
    options: Sequence[str] = ()
    programs: Mapping[int, str] = field(default_factory=dict)
    variables: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    processes: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    port: int = 0

    def start(self, *absent: int) -> World:
        """Start all ranks but those of absent nodes."""
        self.port = free_port()
        meeting = self.out.parent / f"{self.out.name}-meeting-{self.port}"
        meeting.mkdir(parents=True)
        size = len(self.nodes) * self.per_node
        present = [rank for rank in range(size) if rank // self.per_node not in absent]
        for rank in present:
            begin = BEGIN.format(meeting=str(meeting), rank=str(rank), count=len(present))
            self.processes[rank] = self._start(rank, begin)
        return self

    def _start(self, rank: int, begin: str) -> subprocess.Popen[str]:
        node = rank // self.per_node
        size = len(self.nodes) * self.per_node
        code = begin + self.programs.get(node, "")
        code += "\nfrom mpotrain.cli import entry\nentry()\n"
        environment = {key: value for key, value in os.environ.items() if "SLURM" not in key}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": str(size),
            "SLURM_LOCALID": str(rank % self.per_node),
            "SLURM_NODEID": str(node),
            "SLURM_STEP_NUM_NODES": str(len(self.nodes)),
            "SLURM_STEP_TASKS_PER_NODE": f"{self.per_node}(x{len(self.nodes)})",
            "SLURM_STEP_NODELIST": ",".join(self.nodes),
            "SLURMD_NODENAME": self.nodes[node],
        }
        return subprocess.Popen(
            [sys.executable, "-c", code, "preflight", "--out", str(self.out), *self.options],
            env=environment | self.variables.get(node, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, seconds: float = 240.0, alive: Sequence[int] | None = None) -> Ended:
        """Wait for all ranks, or for those given, and return what they left behind."""
        deadline = time.monotonic() + seconds
        codes, outs, errors = {}, {}, {}
        try:
            for rank, process in self.processes.items():
                if alive is not None and rank not in alive:
                    continue
                left = max(0.1, deadline - time.monotonic())
                outs[rank], errors[rank] = process.communicate(timeout=left)
                codes[rank] = process.returncode
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
        path = self.out / "summary.json"
        return Ended(codes, outs, errors, json.loads(path.read_text()) if path.exists() else None)


@dataclass
class Ended:
    """What a pre-flight left behind: by rank, exit code and output; the summary."""

    codes: dict[int, int]
    outs: dict[int, str]
    errors: dict[int, str]
    summary: dict[str, Any] | None

    @property
    def named(self) -> dict[str, bool]:
        """Bad nodes, and whether that is certain."""
        assert self.summary is not None, self.errors
        return {node["node"]: node["certain"] for node in self.summary["bad_nodes"]}

    def problems(self, node: str) -> str:
        """Return what is said of a bad node."""
        assert self.summary is not None
        found = (bad["problems"] for bad in self.summary["bad_nodes"] if bad["node"] == node)
        return " | ".join(next(found))
