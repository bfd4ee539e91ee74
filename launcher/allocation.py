"""The SLURM job that this process is the batch script of, as SLURM's variables describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.launch_error import LaunchError
from launcher.slurm_control import host_names


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
    return Allocation(number, job_id, count(environ, "SLURM_RESTART_COUNT") or 0, nodes)


def count(environ: Mapping[str, str], key: str) -> int | None:
    """Return a whole number among variables; None where there is none.

    Args:
        environ: usually `os.environ`.
        key: name of the variable.
    """
    text = environ.get(key, "")
    return int(text) if text.isascii() and text.isdigit() else None
