"""The SLURM job that this process is the batch script of, as SLURM's variables describe it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.cluster import ClusterConfig
from launcher.launch_error import LaunchError
from launcher.slurm_control import host_names

_EQUAL_TASKS = re.compile(r"([0-9]+)(?:\(x[0-9]+\))?")
"""`4(x2)`: four tasks on each of two nodes."""


@dataclass(frozen=True)
class Allocation:
    """A job and its nodes.

    Attributes:
        number: of the job, unique on the cluster.
        job_id: as people and commands name it: the number, or `ARRAY_TASK` of an array.
        restart_count: how often SLURM has started this job before.
        nodes: names of its nodes, in order.
    """

    number: str
    job_id: str
    restart_count: int
    nodes: tuple[str, ...]


def allocation_of(environ: Mapping[str, str]) -> Allocation:
    """Return the job of this process.

    Args:
        environ: usually `os.environ`.

    Raises:
        LaunchError: this is no batch script.
    """
    number, node_list = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_NODELIST")
    if number is None or node_list is None:
        raise LaunchError(
            "SLURM_JOB_ID and SLURM_JOB_NODELIST are not set: `batch` is what the batch script of "
            "a SLURM job runs; submit one with `python -m launcher slurm` or "
            "`sbatch slurm/train.sbatch`"
        )
    nodes = host_names(node_list)
    if not nodes:
        raise LaunchError(
            f"SLURM_JOB_NODELIST={node_list!r}: `scontrol show hostnames` finds no nodes in it"
        )
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    job_id = number if array is None or task is None else f"{array}_{task}"
    return Allocation(number, job_id, _count(environ, "SLURM_RESTART_COUNT") or 0, nodes)


def cluster_of(environ: Mapping[str, str]) -> ClusterConfig:
    """Return a cluster that describes a job which was submitted by hand, without a cluster file.

    Args:
        environ: usually `os.environ`.

    Raises:
        LaunchError: the job has unequal numbers of tasks on its nodes.
    """
    gpus = _count(environ, "SLURM_GPUS_ON_NODE") or 0
    return ClusterConfig(
        nodes=_count(environ, "SLURM_JOB_NUM_NODES") or 1,
        gpus_per_node=gpus,
        ranks_per_node=_tasks_per_node(environ) or gpus or 1,
        cpus_per_rank=_count(environ, "SLURM_CPUS_PER_TASK") or 1,
    )


def _tasks_per_node(environ: Mapping[str, str]) -> int | None:
    """Return the tasks on each node where the options of sbatch name any."""
    if (count := _count(environ, "SLURM_NTASKS_PER_NODE")) is not None:
        return count
    text = environ.get("SLURM_TASKS_PER_NODE")
    if text is None or "SLURM_NTASKS" not in environ:
        return None
    match = _EQUAL_TASKS.fullmatch(text)
    if match is None:
        raise LaunchError(
            f"SLURM_TASKS_PER_NODE={text}: every node must have as many ranks as every other; "
            "submit with --ntasks-per-node=N in place of --ntasks"
        )
    return int(match[1])


def _count(environ: Mapping[str, str], key: str) -> int | None:
    text = environ.get(key, "")
    return int(text) if text.isascii() and text.isdigit() else None
