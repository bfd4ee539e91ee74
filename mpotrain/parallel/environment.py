"""Which rank this process is, read from what its launcher left in the environment (no torch).

torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT;
srun sets SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID for each task. Half of such a set is an error:
a process that guesses would either wait for peers that never come, or train alone beside them
into the same folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from mpotrain.errors import ParallelError

LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
RENDEZVOUS_KEYS = ("MASTER_ADDR", "MASTER_PORT")
FIRST_PORT = 20_000
NUM_PORTS = 12_000
"""Ports for SLURM jobs: [20000, 32000), below the ephemeral range of Linux."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all processes of the run.

    Attributes:
        rank: number of this process, 0 <= rank < size.
        size: processes in the run.
        local_rank: number of this process on its node.
        local_size: processes on this node.
        node_rank: number of this node.
        master_addr: address of rank 0, None for a single process.
        master_port: port of rank 0, None for a single process.
        launcher: which variables told so: "single", "launcher" (torchrun, deepspeed) or "slurm".
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    master_addr: str | None
    master_port: int | None
    launcher: str


def resolve_environment(environ: Mapping[str, str]) -> Ranks:
    """Find out which rank this process is.

    Args:
        environ: environment variables, usually `os.environ`.

    Returns:
        The rank; RANK and its companions are taken before SLURM's variables (torchrun under srun),
        and a process without either is alone.

    Raises:
        ParallelError: variables are missing, malformed or contradict each other.
    """
    given = [key for key in LAUNCHER_KEYS if key in environ]
    if given:
        return _from_launcher(environ, given)
    if "SLURM_PROCID" in environ and _slurm_size(environ) is not None:
        return _from_slurm(environ)
    return Ranks(0, 1, 0, 1, 0, None, None, "single")


def export_environment(ranks: Ranks, environ: MutableMapping[str, str], device_index: int) -> None:
    """Write the resolved rank in every spelling that libraries read.

    DeepSpeed turns to MPI when one of torch's five variables is missing, and reads LOCAL_SIZE and
    CROSS_* which only its own launcher sets.

    Args:
        ranks: the resolved rank.
        environ: variables to set, usually `os.environ`.
        device_index: index of this process's device among the visible ones; libraries take it
            from LOCAL_RANK.
    """
    environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.size),
        LOCAL_RANK=str(device_index),
        LOCAL_WORLD_SIZE=str(ranks.local_size),
        LOCAL_SIZE=str(ranks.local_size),
        CROSS_RANK=str(ranks.node_rank),
        CROSS_SIZE=str(-(-ranks.size // ranks.local_size)),
        MASTER_ADDR=ranks.master_addr or "127.0.0.1",
        MASTER_PORT=str(ranks.master_port or 0),
    )


def _from_launcher(environ: Mapping[str, str], given: list[str]) -> Ranks:
    size = _integer(environ, "WORLD_SIZE") if "WORLD_SIZE" in environ else None
    needed = (*LAUNCHER_KEYS, *(() if size == 1 else RENDEZVOUS_KEYS))
    missing = [key for key in needed if key not in environ]
    if missing or size is None:
        raise ParallelError(
            f"{', '.join(given)} set, but not {', '.join(missing)}; start through torchrun, "
            f"deepspeed or srun, or unset {', '.join(given)} to run a single process"
        )
    rank, local_rank = _integer(environ, "RANK"), _integer(environ, "LOCAL_RANK")
    _refuse_outside("RANK", rank, "WORLD_SIZE", size)
    local_key = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "LOCAL_SIZE"
    # Without either name the ranks are taken to share one node.
    local_size = _integer(environ, local_key) if local_key in environ else size
    _refuse_outside("LOCAL_RANK", local_rank, local_key, local_size)
    tasks = _slurm_size(environ) if _in_slurm_step(environ) else None
    if tasks is not None and tasks > size:
        raise ParallelError(
            f"srun started {tasks} tasks (SLURM_NTASKS), but WORLD_SIZE is {size}: "
            f"{tasks} processes would each run alone; unset {', '.join(given)} to let the tasks "
            "form one world, or start a launcher on each node"
        )
    node_rank = _integer(environ, "GROUP_RANK") if "GROUP_RANK" in environ else rank // local_size
    return Ranks(
        rank, size, local_rank, local_size, node_rank, *_rendezvous(environ, size), "launcher"
    )


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    size = _slurm_size(environ)
    assert size is not None
    if size > 1 and not _in_slurm_step(environ):
        raise ParallelError(
            f"SLURM_NTASKS is {size}, but this process was not started by srun (SLURM_STEP_ID is "
            "not set): it is the batch script itself; put `srun` in front of the command"
        )
    missing = [key for key in ("SLURM_LOCALID",) if key not in environ]
    rank = _integer(environ, "SLURM_PROCID")
    _refuse_outside("SLURM_PROCID", rank, "SLURM_NTASKS", size)
    master_addr, master_port = None, None
    if size > 1:
        address = environ.get("MASTER_ADDR") or environ.get("SLURM_LAUNCH_NODE_IPADDR")
        if not address:
            missing.append("MASTER_ADDR (or SLURM_LAUNCH_NODE_IPADDR)")
        if "MASTER_PORT" not in environ and "SLURM_JOB_ID" not in environ:
            missing.append("MASTER_PORT (or SLURM_JOB_ID)")
        master_addr = address
    if missing:
        raise ParallelError(
            f"SLURM_PROCID={rank} and SLURM_NTASKS={size} set, but not {', '.join(missing)}; "
            "start the command with srun, and export the address of the first node as MASTER_ADDR"
        )
    if size > 1:
        master_port = _slurm_port(environ)
    node_rank = _integer(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    local_rank = _integer(environ, "SLURM_LOCALID")
    local_size = max(_slurm_local_size(environ, node_rank, size), local_rank + 1)
    return Ranks(rank, size, local_rank, local_size, node_rank, master_addr, master_port, "slurm")


def _rendezvous(environ: Mapping[str, str], size: int) -> tuple[str | None, int | None]:
    if size == 1:
        return None, None
    return environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT")


def _slurm_size(environ: Mapping[str, str]) -> int | None:
    sizes = {
        key: _integer(environ, key)
        for key in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        if key in environ
    }
    if len(set(sizes.values())) > 1:
        facts = ", ".join(f"{key}={value}" for key, value in sizes.items())
        raise ParallelError(f"{facts} contradict each other; unset the one that is stale")
    return next(iter(sizes.values()), None)


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    hints = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_LAUNCH_NODE_IPADDR")
    return any(key in environ for key in hints)


def _slurm_port(environ: Mapping[str, str]) -> int:
    if "MASTER_PORT" in environ:
        return _integer(environ, "MASTER_PORT")
    # A requeued job keeps its id and must not meet its own ghost: the restart count moves the port.
    keys = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    job, life, step = (_integer(environ, key) if key in environ else 0 for key in keys)
    return FIRST_PORT + (job * 31 + life * 7 + step) % NUM_PORTS


def _slurm_local_size(environ: Mapping[str, str], node_rank: int, size: int) -> int:
    """Read "4(x2),3": four tasks on each of two nodes, three on the next."""
    key = "SLURM_STEP_TASKS_PER_NODE"
    text = environ.get(key) or environ.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ParallelError(f"{key}={text!r}: not a list such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node_rank] if node_rank < len(counts) else size


def _integer(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError:
        raise ParallelError(f"{key}={environ[key]!r}: not a whole number") from None


def _refuse_outside(key: str, value: int, size_key: str, size: int) -> None:
    if not 0 <= value < size:
        raise ParallelError(
            f"{key}={value} does not lie in 0 ... {size_key} - 1 ({size_key}={size}); "
            "the variables come from different launches"
        )
