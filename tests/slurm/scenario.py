"""A pretraining run on the lab, disturbed, and held against one that nobody disturbed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from run_process import write_run
from slurm.lab_fixture import SlurmLab

from mpotrain.train.journal import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "configs" / "clusters" / "lab.toml"
NO_CHECK = "preflight = { enabled = false }"
STEPS = 300
LARGEST_DIFFERENCE = 1e-5
"""Of the loss of any step, relative, between a run that was disturbed and one that was not."""
RUN = (
    'engine={kind="deepspeed", zero_stage=1, device="cpu"}',
    f"train.steps={STEPS}",
    "train.eval_every=100",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "checkpoint.every=20",
    "checkpoint.keep_last=2",
)
IS_FULL = os.environ.get("MPOTRAIN_LAB") == "full"
full = pytest.mark.skipif(not IS_FULL, reason="long: set MPOTRAIN_LAB=full")
"""What continuous integration has no time for."""
RANKS = f"ranks_per_node = {2 if IS_FULL else 1}"
"""Of runs that are disturbed: a life starts faster with less of them, and its losses are the same
as those of the run that is not disturbed, which has two on each node."""
Point = tuple[int, float, int]
"""Step, loss and samples seen."""


@dataclass(frozen=True)
class Loss:
    """What a fault cost.

    Attributes:
        seconds: from the fault until the run was one step further than before it.
        steps: that were computed a second time, where a new life did so.
        reached: newest step before the fault.
    """

    seconds: float
    steps: int
    reached: int


class Scenario:
    """One run on the lab, submitted as people submit it."""

    def __init__(
        self,
        lab: SlurmLab,
        root: Path,
        data: Path,
        *cluster: str,
        overrides: Sequence[str] = (),
    ) -> None:
        """Write run file and cluster file.

        Args:
            lab: a cluster.
            root: folder of this scenario.
            data: prepared tokens.
            cluster: lines of TOML laid over the cluster file of the lab.
            overrides: laid over the run file.
        """
        self.lab, self.root = lab, root
        self.run_file = write_run(root, data)
        self.folder = root / "run"
        self.cluster_file = root / "cluster.toml"
        lines = [f'extends = ["{CLUSTER.as_posix()}"]', *cluster]
        self.cluster_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.overrides = [*RUN, *overrides]
        self.job_id = ""

    def launcher(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `python -m launcher` on the login node."""
        argv = [sys.executable, "-m", "launcher", *arguments]
        return self.lab.run(argv, {"PYTHONPATH": str(ROOT)}, cwd=self.root, check=check)

    def submit(self, *options: str) -> str:
        """Submit the run; return the job id."""
        shown = self.launcher(
            "slurm", str(self.run_file), "--cluster", str(self.cluster_file), *options,
            *self.overrides,
        ).stdout  # fmt: skip
        match = re.search(r"^job (\d+)", shown, re.MULTILINE)
        assert match, shown
        self.job_id = match[1]
        return self.job_id

    def step(self) -> int:
        """Return the newest step in the metrics; 0 before the first."""
        try:
            points = read_metrics(self.folder, "train")
        except Exception:
            return 0
        return points[-1]["step"] if points else 0

    def wait_for_step(self, step: int, seconds: float = 180.0) -> None:
        """Wait until the run has done as many steps."""
        self._wait(lambda: self.step() >= step, seconds, f"step {step}")

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the lines of `lives.jsonl`."""
        path = self.folder / "launch" / "lives.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [event for event in found if kind is None or event["event"] == kind]

    def disturb(
        self, fault: Callable[[], object], *, needs_life: bool = True, seconds: float = 300.0
    ) -> Loss:
        """Play a fault and wait until the run is further than before it.

        Args:
            fault: does it.
            needs_life: whether the run comes back in a new life; else it must go on in this one.
            seconds: how long to wait.
        """
        lives = len(self.events("started"))
        before, start = self.step(), time.monotonic()
        fault()
        at_fault = max(before, self.step())

        def is_further() -> bool:
            returned = len(self.events("started")) > lives or not needs_life
            return returned and self.step() > at_fault

        self._wait(is_further, seconds, "the return")
        resumed = self.events("started")[-1]["step"] or 0
        lost = max(at_fault - resumed, 0) if needs_life else 0
        return Loss(time.monotonic() - start, lost, at_fault)

    def nodes(self) -> list[str]:
        """Return the nodes of the present life."""
        nodes: list[str] = self.events("started")[-1]["nodes"]
        return nodes

    def wait_for_event(self, kind: str, count: int, seconds: float = 180.0) -> None:
        """Wait until an event stands in `lives.jsonl` as many times."""
        self._wait(
            lambda: len(self.events(kind)) >= count, seconds, f"{kind} ({count})", may_give_up=True
        )

    def wait_for_fresh_step(self, seconds: float = 180.0) -> None:
        """Wait until the newest life has done a step of its own."""
        begin = self.events("started")[-1]["time"]

        def has_step() -> bool:
            points = read_metrics(self.folder, "train") if self.step() else []
            return bool(points) and points[-1]["time"] > begin

        self._wait(has_step, seconds, "a step of the new life")

    def lost_steps(self) -> int:
        """Return how many steps were computed again: those behind the starts of later lives."""
        ended = [event["step"] or 0 for event in self.events("ended")]
        started = [event["step"] or 0 for event in self.events("started")]
        return sum(max(a - b, 0) for a, b in zip(ended, started[1:], strict=False))

    def wait_until_done(self, seconds: float = 300.0) -> None:
        """Wait until the run has ended as it should."""
        self._wait(lambda: bool(self.events("done")), seconds, "the end of the run")
        self._wait(lambda: not self.lab.queue(), 60, "the job to leave the queue")

    def curve(self) -> list[Point]:
        """Return the loss of every step; a step that stands there twice fails."""
        points = read_metrics(self.folder, "train")
        steps = [point["step"] for point in points]
        assert steps == sorted(set(steps)), "a step stands in the metrics twice"
        return [(point["step"], point["loss"], point["consumed_samples"]) for point in points]

    def log(self) -> str:
        """Return all logs of the run."""
        return "\n".join(path.read_text() for path in sorted((self.folder / "logs").glob("*")))

    def _wait(
        self, reached: Callable[[], bool], seconds: float, what: str, *, may_give_up: bool = False
    ) -> None:
        end = time.monotonic() + seconds
        while not reached():
            lost = bool(self.events("gave_up")) and not may_give_up
            if lost or time.monotonic() > end:
                events = "\n".join(f"{e['event']}: {e.get('detail')}" for e in self.events())
                pytest.fail(
                    f"waited {seconds:.0f} s for {what}; step {self.step()}\n{events}\n"
                    f"{self.lab.report()}\n{self.log()[-6000:]}"
                )
            time.sleep(0.3)


Make = Callable[..., Scenario]
"""Makes a run from lines of its cluster file, and `overrides`; see the fixture `make`."""


def require_equal(disturbed: list[Point], undisturbed: list[Point]) -> None:
    """No sample repeated or left out, and the same loss at every step."""
    assert len(disturbed) == len(undisturbed) >= STEPS
    for (step, loss, samples), (other_step, other_loss, other_samples) in zip(
        disturbed, undisturbed, strict=True
    ):
        assert (step, samples) == (other_step, other_samples)
        assert abs(loss - other_loss) <= LARGEST_DIFFERENCE * abs(other_loss), step
