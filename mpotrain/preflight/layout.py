"""Which nodes there should be, and which have answered (no torch)."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpotrain.errors import ParallelError
from mpotrain.parallel.environment import Ranks
from mpotrain.preflight.facts import NodeFacts
from mpotrain.preflight.hostlist import step_nodes

PER_NODE = "per-node"
"""What `Ranks.launcher` says where every node was started by itself."""


@dataclass(frozen=True)
class Presence:
    """What a rank says of itself when it has reached the first one.

    Attributes:
        rank: its number.
        node: number of its node.
        name: of its node.
        local_size: ranks that its node should run.
        start: identity of the files that it writes.
    """

    rank: int
    node: int
    name: str
    local_size: int
    start: str


def node_name(environ: Mapping[str, str]) -> str:
    """Return the name of this node: that of the scheduler, by which it can be excluded, or host's.

    Args:
        environ: environment variables.
    """
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def world_of_nodes(
    environ: Mapping[str, str], ranks: Ranks, names: Sequence[str], name: str
) -> Ranks:
    """Return the place among the ranks of all nodes, of a process that knows its node's alone.

    Args:
        environ: environment variables; MASTER_ADDR and MASTER_PORT say where all meet.
        ranks: place among the ranks of this node.
        names: of all nodes, in order; each runs as many ranks.
        name: of this node.

    Raises:
        ParallelError: this node is not among them, or it is not told where to meet.
    """
    if name not in names:
        raise ParallelError(f"--nodes {','.join(names)}: does not name this node, {name}")
    if ranks.local_size != ranks.size:
        raise ParallelError(
            f"--per-node-start: {ranks.size} ranks were started, {ranks.local_size} of them on "
            "this node; start every node by itself"
        )
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT", "")
    if len(names) > 1 and not (address and port.isdigit()):
        raise ParallelError("--per-node-start: needs MASTER_ADDR and MASTER_PORT")
    number = list(names).index(name)
    return Ranks(
        rank=number * ranks.size + ranks.rank,
        size=len(names) * ranks.size,
        local_rank=ranks.local_rank,
        local_size=ranks.size,
        node_rank=number,
        master_addr=address,
        master_port=int(port) if port.isdigit() else None,
        launcher=PER_NODE,
    )


def world_name(environ: Mapping[str, str], ranks: Ranks) -> str:
    """Return what tells this world from those before and beside it, without a message.

    Args:
        environ: environment variables.
        ranks: place of this process.
    """
    keys = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")
    return " ".join([str(ranks.size), *(environ.get(key, "-") for key in keys)])


def num_expected_nodes(environ: Mapping[str, str], ranks: Ranks) -> int:
    """Return how many nodes the world has.

    Args:
        environ: environment variables: SLURM and torchrun tell the number.
        ranks: place of this process.
    """
    keys = {"slurm": ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"), "launcher": ("GROUP_WORLD_SIZE",)}
    for key in keys.get(ranks.launcher, ()):
        if environ.get(key, "").isdigit():
            return max(1, int(environ[key]))
    return -(-ranks.size // ranks.local_size)


def expected_names(
    environ: Mapping[str, str], ranks: Ranks, given: Sequence[str], num_nodes: int
) -> list[str]:
    """Return how nodes are called that may never say so themselves.

    Args:
        environ: environment variables; those of a SLURM step name its nodes.
        ranks: place of this process.
        given: names by the user; taken if there is one for each node.
        num_nodes: of the world.
    """
    listed = step_nodes(environ) if ranks.launcher == "slurm" else ()
    for names in (tuple(given), listed):
        if len(names) == num_nodes:
            return list(names)
    return [f"node number {number}" for number in range(num_nodes)]


def roll_call(present: Sequence[Presence], size: int, names: Sequence[str]) -> list[NodeFacts]:
    """Return all expected nodes, with the number of ranks of each that have answered.

    Args:
        present: the ranks that have answered.
        size: ranks of the world.
        names: of the expected nodes, for those that have not answered.
    """
    met = Counter(rank.node for rank in present)
    expected = {rank.node: rank.local_size for rank in present}
    called = dict(enumerate(names)) | {rank.node: rank.name for rank in present}
    numbers = sorted(called)
    absent = [number for number in numbers if number not in met]
    left_over = size - sum(expected.values())
    for number in absent:
        expected[number] = max(1, left_over // len(absent))
    unique = _unique([called[number] for number in numbers], numbers)
    return [
        NodeFacts(number, name, expected[number], met[number])
        for number, name in zip(numbers, unique, strict=True)
    ]


def _unique(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Tell apart nodes that share a name (several on one host, as in tests)."""
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name}.{number}"
        for name, number in zip(names, numbers, strict=True)
    ]
