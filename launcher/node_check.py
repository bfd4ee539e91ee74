"""The pre-flight of a life: one step that checks every node before the ranks are started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.cluster import ClusterConfig
from launcher.commands import Command
from launcher.job import JobFacts
from launcher.run_folder import LAUNCH
from launcher.slurm_commands import srun_command
from launcher.step import StepRules

PREFLIGHT = "preflight"
"""Folder of all reports in the launcher's folder."""
EXTRA_SECONDS = 60.0
"""Beyond the pre-flight's own time limit: the start of Python and of a container."""
PORT_OFFSET = 3
"""So that the ranks do not meet the ghosts of the check; lives are 7 ports apart."""


@dataclass(frozen=True)
class NodeVerdict:
    """What the pre-flight says.

    Attributes:
        ok: whether the ranks may start.
        bad_nodes: what is wrong, by node.
        exclude: those of them that the next life had better not use.
        problems: what is wrong with no single node.
    """

    ok: bool
    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The verdict in words."""
        if self.ok:
            return "the pre-flight found all nodes well"
        bad = [f"{node}: {problem}" for node, problem in self.bad_nodes.items()]
        return "the pre-flight failed: " + "; ".join([*bad, *self.problems])


def report_folder(run_folder: Path, job: JobFacts) -> Path:
    """Return the folder of the reports of one life."""
    return run_folder / LAUNCH / PREFLIGHT / f"{job.job_id}-{job.life}"


def check_command(cluster: ClusterConfig, run_folder: Path, job: JobFacts) -> Command:
    """Return the srun command that checks all nodes, one task for each rank.

    Args:
        cluster: the cluster.
        run_folder: where the run writes, an absolute path.
        job: this life.
    """
    limits = cluster.preflight
    argv = (
        cluster.rank_interpreter, "-m", "mpotrain", "preflight",
        f"--out={report_folder(run_folder, job)}",
        f"--run-folder={run_folder}",
        f"--device={'cuda' if cluster.gpus_per_node else 'cpu'}",
        f"--expect-gpus={cluster.gpus_per_node}",
        f"--min-gpu-gib={limits.min_gpu_gib}",
        f"--min-free-gib={limits.min_free_gib}",
        f"--min-write-mib-per-s={limits.min_write_mib_per_s}",
        f"--min-bandwidth-gib-per-s={limits.min_bandwidth_gib_per_s}",
        f"--max-clock-skew-seconds={limits.max_clock_skew_seconds}",
        f"--timeout-seconds={limits.timeout_seconds}",
        f"--nodes={','.join(job.nodes)}",
    )  # fmt: skip
    elsewhere = replace(job, master_port=job.master_port + PORT_OFFSET)
    command = srun_command(cluster, elsewhere, argv, tasks_per_node=cluster.local_ranks)
    # A node on which the check itself crashes must not take the reports of the others with it.
    tolerant = {"--kill-on-bad-exit=1": "--kill-on-bad-exit=0"}
    own = f"--wait={cluster.lives.srun_wait_seconds}"
    tolerant[own] = f"--wait={limits.timeout_seconds}"
    start = command.argv.index(cluster.rank_interpreter)
    options = (tolerant.get(option, option) for option in command.argv[:start])
    return Command((*options, *command.argv[start:]), command.environment)


def check_rules(cluster: ClusterConfig) -> StepRules:
    """Return how long the check may take."""
    return StepRules(
        grace_seconds=1.0,
        wait_seconds=cluster.preflight.timeout_seconds,
        forward_warning=False,
        limit_seconds=cluster.preflight.timeout_seconds + EXTRA_SECONDS,
    )


def read_verdict(folder: Path, nodes: Sequence[str]) -> NodeVerdict:
    """Return what a check has found.

    Args:
        folder: see `report_folder`.
        nodes: all nodes of the job; one of which there is no report is bad.
    """
    summary = _read(folder / "summary.json")
    if summary is not None and isinstance(summary.get("ok"), bool):
        return _of_summary(summary, nodes)
    bad: dict[str, str] = {}
    try:
        found = [_read(path) for path in folder.glob("node-*.json")]
    except OSError as error:
        # This says nothing about any node.
        problem = f"{folder}: the reports cannot be read ({error.strerror or error})"
        return NodeVerdict(False, problems=(problem,))
    reports = {report.get("node"): report for report in found if report}
    for node in nodes:
        report = reports.get(node)
        if report is None:
            bad[node] = "has not answered"
        elif report.get("ok") is not True:
            bad[node] = _joined(report.get("problems")) or "is not well"
    problems = ("it ended without a summary",)
    return NodeVerdict(False, bad, tuple(bad), problems)


def _of_summary(summary: Mapping[str, Any], nodes: Sequence[str]) -> NodeVerdict:
    bad, doubtful = {}, set()
    entries = summary.get("bad_nodes")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("node") in nodes:
            bad[entry["node"]] = _joined(entry.get("problems")) or "is not well"
            if entry.get("certain") is False:
                doubtful.add(entry["node"])
    # Where one of two nodes is bad and nobody knows which, the others that are known come first.
    exclude = tuple(node for node in bad if node not in doubtful) or tuple(bad)
    problems = summary.get("problems")
    texts = tuple(map(str, problems)) if isinstance(problems, list) else ()
    return NodeVerdict(summary["ok"] and not bad, bad, exclude, texts)


def _joined(problems: object) -> str:
    return ", ".join(map(str, problems)) if isinstance(problems, list) else ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
