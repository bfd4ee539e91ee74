"""What a pre-flight looks at and what it asks for (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

CHECKS = ("gpus", "disk", "clock", "versions", "collectives")
"""Names of the checks, as `--skip` takes them."""
DEFAULT_CLOCK_SKEW = 5.0
DEFAULT_TIMEOUT = 300.0
MIN_TIMEOUT = 10.0

MEETING_SHARE = 0.35
"""Part of the time in which all ranks must have reached the first one."""
SEARCH_SHARE = 0.75
"""Part of that in which a rank must have found the first one, or gives up looking."""
LOCAL_SHARE = 0.25
"""Part of the time that checks of a node by itself may take."""
RESERVE_SHARE = 0.08
"""Part of the time that is kept for verdict and report."""
RESERVE_SECONDS = 4.0
"""Before a process is ended, it has this time to write what it knows."""
GRACE_SHARE = 0.05
MAX_GRACE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class PreflightOptions:
    """Options of one pre-flight; all ranks are given the same.

    A threshold of 0 is not judged; its measurement is in the report all the same.

    Attributes:
        out: folder of the reports, on a file system that all nodes share.
        run_folder: where checkpoints will be written; None = `out`.
        device: "auto" (CUDA where there is any), "cpu" or "cuda".
        expect_gpus: GPUs of every node; None = as many as most nodes have.
        min_gpu_gib: GiB that every GPU must have free.
        min_free_gib: GiB that must be free where the run folder lies.
        min_write_mib_per_s: MiB per second, fsync included, of every node into the run folder.
        min_bandwidth_gib_per_s: GiB per second (bus bandwidth) of all-reduces within a node and
            between two nodes.
        max_clock_skew_seconds: how far a clock may be from those of the other nodes.
        timeout_seconds: after which the whole pre-flight has an answer.
        skip: names of checks that are left out.
        nodes: names of the nodes in the order of their numbers, where they are known; they name
            a node that never answered.
        per_node_start: whether every node starts the command by itself, so that the environment
            tells of the ranks of one node alone.
    """

    out: Path
    run_folder: Path | None = None
    device: str = "auto"
    expect_gpus: int | None = None
    min_gpu_gib: float = 0.0
    min_free_gib: float = 0.0
    min_write_mib_per_s: float = 0.0
    min_bandwidth_gib_per_s: float = 0.0
    max_clock_skew_seconds: float = DEFAULT_CLOCK_SKEW
    timeout_seconds: float = DEFAULT_TIMEOUT
    skip: frozenset[str] = frozenset()
    nodes: tuple[str, ...] = ()
    per_node_start: bool = False

    @property
    def written_folder(self) -> Path:
        """The folder whose disk is measured."""
        return self.out if self.run_folder is None else self.run_folder

    @property
    def meeting_seconds(self) -> float:
        """How long the first rank waits for the others to appear."""
        return MEETING_SHARE * self.timeout_seconds

    @property
    def search_seconds(self) -> float:
        """How long another rank looks for the first one: so that it can still say it failed."""
        return SEARCH_SHARE * self.meeting_seconds

    @property
    def local_seconds(self) -> float:
        """How long the checks of a node by itself may take."""
        return LOCAL_SHARE * self.timeout_seconds

    @property
    def grace_seconds(self) -> float:
        """How much longer the first rank waits for an answer than its sender was given."""
        return min(GRACE_SHARE * self.timeout_seconds, MAX_GRACE_SECONDS)

    def does(self, check: str) -> bool:
        """Tell whether the check of that name is made."""
        return check not in self.skip

    def problems(self) -> list[str]:
        """Return everything wrong with the options, one line each, by option."""
        found = []
        for name in (
            "min_gpu_gib",
            "min_free_gib",
            "min_write_mib_per_s",
            "min_bandwidth_gib_per_s",
            "max_clock_skew_seconds",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                option = name.replace("_", "-")
                found.append(f"--{option} {value}: must be a number of at least 0 (0 = no limit)")
        if not MIN_TIMEOUT <= self.timeout_seconds < math.inf:
            found.append(
                f"--timeout-seconds {self.timeout_seconds}: must be at least {MIN_TIMEOUT:g}: "
                "processes need seconds to start and meet"
            )
        if self.expect_gpus is not None and self.expect_gpus < 0:
            found.append(f"--expect-gpus {self.expect_gpus}: must be at least 0")
        if self.expect_gpus and self.device == "cpu":
            found.append(f"--expect-gpus {self.expect_gpus}: goes with --device auto or cuda")
        if self.per_node_start and not self.nodes:
            found.append("--per-node-start: needs the names of all nodes (--nodes)")
        if len(set(self.nodes)) < len(self.nodes):
            found.append(f"--nodes {','.join(self.nodes)}: names a node twice")
        return found
