"""The cluster file: how much of which machine a run gets, and how its ranks are started there.

It is read like a run file: TOML, `extends`, strict, every mistake at once with file and dotted key.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from launcher.cluster_file import read_cluster_file
from launcher.cluster_problems import (
    environment_problems,
    extra_problems,
    memory_problems,
    module_problems,
    node_list_problems,
    path_problems,
    text_problems,
)
from launcher.containers import ContainerConfig, NoContainer
from launcher.policies import LivesConfig, PreflightConfig
from launcher.slurm_time import seconds_of
from mpotrain.config_file import dump
from mpotrain.schema import collect_problems, config

__all__ = [
    "ClusterConfig",
    "ContainerConfig",
    "LivesConfig",
    "PreflightConfig",
    "dump_cluster",
    "load_cluster",
]

Flavour = Literal["srun", "torchrun", "deepspeed"]

_LEAST = {"nodes": 1, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_rank": 1}
_TEXTS = (
    *("memory", "partition", "account", "qos", "constraint", "reservation", "exclude"),
    *("python", "network"),
)


@config
class ClusterConfig:
    """Where a run runs: nodes, devices, queue, surroundings, life cycle."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 0
    """GPUs on each node; 0 runs on CPUs."""
    ranks_per_node: int | None = None
    """Ranks on each node; absent: one for each GPU, or a single one."""
    cpus_per_rank: int = 1
    """CPU cores of each rank, and its threads where the environment sets no OMP_NUM_THREADS."""
    memory: str | None = None
    """Memory of each node as SLURM takes it ("64G"); "0" is all there is. Absent: the default of
    the partition."""
    time: str | None = None
    """Time limit of one life as SLURM takes it ("4:00:00", "2-00:00:00", minutes). Absent: that of
    the partition."""
    partition: str | None = None
    """Partition (queue)."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    reservation: str | None = None
    """Reservation to use."""
    exclude: str | None = None
    """Nodes not to use, as SLURM takes them ("node[3-4],node9")."""
    gpu_option: Literal["gres", "gpus-per-node"] = "gres"
    """Which option asks for GPUs: `--gres=gpu:N` or `--gpus-per-node=N`."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, each one argument (`--licenses=scratch`)."""
    modules: tuple[str, ...] = ()
    """Environment modules that the job loads first."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of all ranks."""
    python: str | None = None
    """The interpreter on the nodes; absent: the one that submits."""
    container: ContainerConfig = NoContainer()
    """Container that ranks run in."""
    launcher: Flavour = "srun"
    """Who starts the ranks: srun each of them, or torchrun or deepspeed on each node."""
    network: str | None = None
    """Network interface of gloo and NCCL between nodes; absent: they choose."""
    lives: LivesConfig = LivesConfig()
    """Life cycle."""
    preflight: PreflightConfig = PreflightConfig()
    """Check of the nodes before the first rank starts."""

    @property
    def local_ranks(self) -> int:
        """Ranks on each node, with the default filled in."""
        return self.ranks_per_node if self.ranks_per_node is not None else self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.local_ranks

    @property
    def has_gpus(self) -> bool:
        """Whether the job asks for GPUs, be it by a further option of sbatch (`--gpus=8`)."""
        asking = ("--gpu", "--gres", "--tres-per")
        return self.gpus_per_node > 0 or any(option.startswith(asking) for option in self.extra)

    @property
    def interpreter(self) -> str:
        """The interpreter on the nodes, outside of containers."""
        return self.python or sys.executable

    @property
    def rank_interpreter(self) -> str:
        """The interpreter of the ranks: that of the container where there is one."""
        if isinstance(self.container, NoContainer):
            return self.interpreter
        return self.container.python

    def problems(self) -> list[str]:
        """Return everything wrong with the file, one line each, beginning with the dotted key."""
        return collect_problems(
            *(partial(self._least_problems, key, least) for key, least in _LEAST.items()),
            self._gpu_problems,
            *(partial(self._text_problems, key) for key in _TEXTS),
            lambda: path_problems({"python": self.python}),
            lambda: memory_problems(self.memory, "memory"),
            lambda: node_list_problems(self.exclude, "exclude"),
            self._time_problems,
            self._warning_problems,
            lambda: extra_problems(self.extra, "extra"),
            lambda: module_problems(self.modules, "modules"),
            lambda: environment_problems(self.environment, "environment"),
            lambda: self.container.problems("container"),
            lambda: self.lives.problems("lives"),
            lambda: self.preflight.problems("preflight"),
            self._worker_problems,
        )

    def _least_problems(self, key: str, least: int) -> list[str]:
        given = getattr(self, key)
        if given is None or given >= least:
            return []
        return [f"{key}: must be at least {least}, is {given}"]

    def _gpu_problems(self) -> list[str]:
        if self.gpus_per_node <= 0 or self.local_ranks <= self.gpus_per_node:
            return []
        return [
            f"ranks_per_node: {self.local_ranks} ranks on {self.gpus_per_node} GPUs "
            "(gpus_per_node); every rank needs a GPU of its own"
        ]

    def _text_problems(self, key: str) -> list[str]:
        return text_problems({key: getattr(self, key)})

    def _time_problems(self) -> list[str]:
        if self.time is None or seconds_of(self.time):
            return []
        return [
            f"time: {self.time!r} is no time limit; write minutes, HOURS:MM:SS or DAYS-HH:MM:SS"
        ]

    def _warning_problems(self) -> list[str]:
        seconds = None if self.time is None else seconds_of(self.time)
        if not seconds or seconds > self.lives.warning_seconds:
            return []
        return [
            f"time: {self.time} is {seconds} s, not longer than the warning before its end "
            f"(lives.warning_seconds {self.lives.warning_seconds}): nothing would be trained"
        ]

    def _worker_problems(self) -> list[str]:
        restarts = self.lives.worker_restarts
        if restarts <= 0 or self.launcher == "torchrun":
            return []
        return [
            f'lives.worker_restarts: {restarts}, but launcher "{self.launcher}" cannot start ranks '
            'anew inside a life; use launcher="torchrun", or 0'
        ]


def load_cluster(path: Path, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Read, merge and validate a cluster file.

    Args:
        path: TOML cluster file; may extend others.
        overrides: `dotted.key=value` lines.

    Returns:
        The validated cluster.

    Raises:
        ConfigError: with every mistake, each with its file and dotted key.
    """
    return read_cluster_file(ClusterConfig, path, overrides)


def dump_cluster(cluster: ClusterConfig) -> str:
    """Return a cluster as TOML that reads back to an equal one, its interpreter filled in."""
    return dump(replace(cluster, python=cluster.interpreter))
