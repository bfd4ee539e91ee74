"""A run weighed for the world of its cluster before anything is started or queued."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster import ClusterConfig
from launcher.commands import Task
from launcher.saved_run import require_same_model
from mpotrain.config import RunConfig, RunSettings, load_config
from mpotrain.errors import ConfigError
from mpotrain.report.text import render
from mpotrain.report.units import human_bytes
from mpotrain.report.weigh import weigh
from mpotrain.tune.config import load_tune_config

ENGINE_PACKAGES = {"deepspeed": "deepspeed", "megatron": "megatron"}
"""Packages of the engines that need one."""


@dataclass(frozen=True)
class PlanCheck:
    """What the plan of a run says.

    Attributes:
        summary: the run in one line.
        text: the whole plan for people; empty for fine-tuning, which has none.
        notes: what could not be checked, or may not be meant.
    """

    summary: str
    text: str = ""
    notes: tuple[str, ...] = ()


def load_run(path: Path, task: Task, overrides: Sequence[str]) -> RunSettings:
    """Read the file of a run.

    Args:
        path: TOML run file.
        task: what the run does.
        overrides: `dotted.key=value` lines.

    Raises:
        ConfigError: with every mistake, each with its file and dotted key.
    """
    if not path.exists():
        raise ConfigError([f"{path}: does not exist; name the file of a run (TOML)"])
    return load_config(path, overrides) if task == "train" else load_tune_config(path, overrides)


def check_plan(
    run: RunSettings, world_size: int, where: str, cluster: ClusterConfig | None = None
) -> PlanCheck:
    """Weigh a run for a world, and hold it against what its folder holds already.

    Args:
        run: the run.
        world_size: its ranks.
        where: run file, for the messages.
        cluster: where they run; None where no cluster file says so.

    Raises:
        ConfigError: the run cannot start with so many ranks, or with the data that are here.
        CheckpointError: the run folder has a checkpoint of another model.
    """
    problems = run.problems(world_size)
    report = None
    if isinstance(run, RunConfig):
        report = weigh(run, world_size)
        problems = report.problems
    problems = [*problems, *_device_problems(run, cluster), *_engine_problems(run, cluster)]
    if problems:
        ranks = f"with {world_size} rank{'s' if world_size > 1 else ''}"
        raise ConfigError([f"{where}: {ranks}: {problem}" for problem in problems])
    require_same_model(run, Path(run.folder), where)
    notes = tuple(_device_notes(run, cluster))
    steps = f"{run.train.steps:,} steps of {run.train.global_batch_size:,} samples"
    summary = f"{run.name}: {steps} on {world_size:,} ranks"
    if report is None:
        return PlanCheck(f"{summary}, engine {run.engine.kind}", notes=notes)
    memory = human_bytes(report.memory_per_rank)
    summary += f", {report.num_parameters:,} parameters, about {memory} a rank"
    summary += f", engine {run.engine.kind}"
    return PlanCheck(summary, render(report), (*report.notes, *notes))


def _device_problems(run: RunSettings, cluster: ClusterConfig | None) -> list[str]:
    if run.engine.device != "cuda" or cluster is None or cluster.has_gpus:
        return []
    return [
        'engine.device: "cuda", but the cluster file asks for no GPUs (gpus_per_node is 0); set '
        'gpus_per_node there, or engine.device="cpu"'
    ]


def _engine_problems(run: RunSettings, cluster: ClusterConfig | None) -> list[str]:
    package = ENGINE_PACKAGES.get(run.engine.kind)
    if package is None or cluster is None or importlib.util.find_spec(package) is not None:
        return []
    elsewhere = cluster.python is not None or cluster.container.kind != "none"
    if elsewhere or cluster.modules or "PYTHONPATH" in cluster.environment:
        return []  # ranks have other packages than this process
    return [
        f"engine.kind: {run.engine.kind!r} needs the package {package}, which {sys.executable} "
        f'does not have; install it there with pip install "mpotrain[{run.engine.kind}]", or name '
        "another interpreter (python in the cluster file)"
    ]


def _device_notes(run: RunSettings, cluster: ClusterConfig | None) -> list[str]:
    if run.engine.device != "cpu" or cluster is None or cluster.gpus_per_node == 0:
        return []
    return [
        f'engine.device: "cpu", but the cluster file asks for {cluster.gpus_per_node} GPUs on each '
        'node (gpus_per_node), which would have nothing to do; set it to 0, or engine.device="auto"'
    ]
