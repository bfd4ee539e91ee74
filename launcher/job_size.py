"""How large the job of this process is, and what of a cluster file that leaves."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from launcher.allocation import count
from launcher.cluster import ClusterConfig
from launcher.launch_error import LaunchError

logger = logging.getLogger(__name__)

_ON_NODES = re.compile(r"([0-9]+)(?:\(x[0-9]+\))?")
"""`4(x2)`: four tasks, or CPUs, on each of two nodes."""


@dataclass(frozen=True)
class JobSize:
    """The size of a job.

    Attributes:
        nodes: of the job.
        tasks: on each node; None where the options of sbatch name none.
        cpus_per_task: None where they do not say.
        cpus: on each node, or on the one that has fewest; None where SLURM does not say.
        gpus: on each node; 0 where the options of sbatch ask for none.
    """

    nodes: int
    tasks: int | None
    cpus_per_task: int | None
    cpus: int | None
    gpus: int

    def is_that_of(self, cluster: ClusterConfig) -> bool:
        """Whether a job has this size that the launcher has submitted for a cluster file."""
        tasks = cluster.local_ranks if cluster.launcher == "srun" else 1
        cpus = cluster.local_ranks * cluster.cpus_per_rank // tasks
        size = (self.nodes, self.tasks, self.cpus_per_task)
        return size == (cluster.nodes, tasks, cpus) and self.gpus >= cluster.gpus_per_node


def job_size(environ: Mapping[str, str]) -> JobSize:
    """Return the size of the job that this process is the batch script of.

    Args:
        environ: usually `os.environ`.

    Raises:
        LaunchError: the job has unequal numbers of tasks on its nodes.
    """
    cpus = _ON_NODES.findall(environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    return JobSize(
        nodes=count(environ, "SLURM_JOB_NUM_NODES") or 1,
        tasks=_tasks_per_node(environ),
        cpus_per_task=count(environ, "SLURM_CPUS_PER_TASK"),
        cpus=min(map(int, cpus), default=None),
        gpus=count(environ, "SLURM_GPUS_ON_NODE") or 0,
    )


def cluster_of(size: JobSize) -> ClusterConfig:
    """Return a cluster that describes a job which was submitted by hand, without a cluster file.

    Args:
        size: of the job.

    Raises:
        LaunchError: the job has fewer CPUs than ranks.
    """
    ranks = size.tasks or size.gpus or 1
    cpus = size.cpus_per_task or 1
    if size.tasks is None and size.gpus and size.cpus is not None:
        # SLURM has counted them for one task, in whose place a rank for each GPU starts.
        cpus = size.cpus // ranks
    if cpus < 1:
        raise LaunchError(_too_few_cpus(size, ranks))
    return ClusterConfig(
        nodes=size.nodes, gpus_per_node=size.gpus, ranks_per_node=ranks, cpus_per_rank=cpus
    )


def sized(cluster: ClusterConfig, size: JobSize, where: str) -> ClusterConfig:
    """Return a cluster with the size of the job, which a person may have submitted by hand.

    What the options of the job name wins over the file, also for a job that takes its place.

    Args:
        cluster: the cluster.
        size: of the job.
        where: its file, for the messages.

    Raises:
        LaunchError: the job cannot be what the file describes.
    """
    if size.is_that_of(cluster):
        return cluster
    found = replace(cluster, nodes=size.nodes)
    if cluster.launcher == "srun":
        ranks = size.tasks or cluster.ranks_per_node or size.gpus or 1
        found = replace(found, gpus_per_node=size.gpus, ranks_per_node=ranks)
    found = replace(found, cpus_per_rank=_cpus_per_rank(found, size))
    if problems := _problems(found, size, needs_gpus=cluster.gpus_per_node > 0):
        raise LaunchError("\n".join(f"{where}: {problem}" for problem in problems))
    logger.info(
        "the job has %s; the options of the job count, and not %s, which says %s",
        _shown(found),
        where,
        _shown(cluster),
    )
    return found


def _cpus_per_rank(cluster: ClusterConfig, size: JobSize) -> int:
    if cluster.launcher == "srun" and size.tasks and size.cpus_per_task:
        return size.cpus_per_task
    if size.cpus is None:
        return cluster.cpus_per_rank
    return min(cluster.cpus_per_rank, size.cpus // cluster.local_ranks)


def _problems(cluster: ClusterConfig, size: JobSize, *, needs_gpus: bool) -> list[str]:
    found, ranks = [], cluster.local_ranks
    if cluster.launcher != "srun" and size.tasks not in (None, 1, ranks):
        found.append(
            f"ranks_per_node: the job has {size.tasks} tasks on each node, but {cluster.launcher} "
            f"starts {ranks} ranks there; submit with --ntasks-per-node=1, or change the file"
        )
    if needs_gpus and size.gpus < ranks:
        found.append(
            f"gpus_per_node: the job has {size.gpus} GPUs on each node for {ranks} ranks; every "
            "rank needs a GPU of its own"
        )
    if cluster.cpus_per_rank < 1:
        found.append(f"cpus_per_rank: {_too_few_cpus(size, ranks)}")
    return found


def _too_few_cpus(size: JobSize, ranks: int) -> str:
    return (
        f"the job has {size.cpus} CPUs on each node for {ranks} ranks; submit with "
        f"--ntasks-per-node={ranks} --cpus-per-task=N"
    )


def _shown(cluster: ClusterConfig) -> str:
    return (
        f"{cluster.nodes} nodes x {cluster.local_ranks} ranks with {cluster.cpus_per_rank} CPUs "
        f"each and {cluster.gpus_per_node} GPUs a node"
    )


def _tasks_per_node(environ: Mapping[str, str]) -> int | None:
    """Return the tasks on each node where the options of sbatch name any."""
    if (named := count(environ, "SLURM_NTASKS_PER_NODE")) is not None:
        return named
    text = environ.get("SLURM_TASKS_PER_NODE")
    if text is None or "SLURM_NTASKS" not in environ:
        return None
    match = _ON_NODES.fullmatch(text)
    if match is None:
        raise LaunchError(
            f"SLURM_TASKS_PER_NODE={text}: every node must have as many ranks as every other; "
            "submit with --ntasks-per-node=N in place of --ntasks"
        )
    return int(match[1])
