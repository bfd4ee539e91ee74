"""From a cluster file to exact commands of this machine: argument lists and environment.

Everything here is a pure function of its arguments: nothing is started, read or looked up. An
argument list never passes through a shell, so no text in it needs quoting.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from launcher.cluster import ClusterConfig

Task = Literal["train", "tune"]
"""Sub-command of mpotrain that ranks run."""


@dataclass(frozen=True)
class Command:
    """A command that can be started.

    Attributes:
        argv: program and arguments.
        environment: variables set over those of the process that starts it.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """Where ranks or launchers of several nodes meet.

    Attributes:
        address: name or address of the first node.
        port: its port.
    """

    address: str
    port: int

    def __str__(self) -> str:
        """Return `address:port`, with brackets around an IPv6 address."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}"


def module_argv(task: Task, run_file: str, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    """Return module and arguments of a rank, as they follow `python -m`.

    Args:
        task: sub-command of mpotrain.
        run_file: run file; give an absolute path, which no option parser takes for an option.
        overrides: `dotted.key=value` lines.
    """
    return ("mpotrain", task, run_file, *overrides)


def train_argv(
    python: str, task: Task, run_file: str, overrides: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the command of one rank.

    Args:
        python: interpreter.
        task: sub-command of mpotrain.
        run_file: run file.
        overrides: `dotted.key=value` lines.
    """
    return (python, "-m", *module_argv(task, run_file, overrides))


def rank_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Return the variables that all ranks get, whoever starts them.

    Args:
        cluster: its own variables win over those that follow from other keys.
    """
    environment = {"OMP_NUM_THREADS": str(cluster.cpus_per_rank), "PYTHONUNBUFFERED": "1"}
    if cluster.network is not None:
        environment["GLOO_SOCKET_IFNAME"] = cluster.network
        environment["NCCL_SOCKET_IFNAME"] = cluster.network
    if cluster.lives.worker_restarts > 0:
        # torch 2.5 to 2.13: the store that torchrun shares with ranks keeps the addresses of the
        # ranks before, and those started anew wait for them for ever (pytorch issue 135712).
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return environment | cluster.environment


def local_command(
    cluster: ClusterConfig, task: Task, run_file: str, overrides: Sequence[str] = ()
) -> Command:
    """Return the command of a run of one process on this machine.

    Args:
        cluster: interpreter, container and variables.
        task: sub-command of mpotrain.
        run_file: run file.
        overrides: `dotted.key=value` lines.
    """
    argv = train_argv(cluster.rank_interpreter, task, run_file, overrides)
    return Command(cluster.container.inside(argv), rank_environment(cluster))


def torchrun_command(
    python: str,
    module: Sequence[str],
    *,
    ranks_per_node: int,
    nodes: int = 1,
    node_rank: int = 0,
    master: Endpoint | None = None,
    own_address: str | None = None,
    rendezvous_id: str | None = None,
    max_restarts: int = 0,
) -> tuple[str, ...]:
    """Return the torchrun command of one node.

    Args:
        python: interpreter.
        module: what ranks run, see `module_argv`.
        ranks_per_node: ranks that it starts here.
        nodes: number of nodes.
        node_rank: number of this node; node 0 serves the rendezvous.
        master: where nodes meet; needed with more than one.
        own_address: address at which other nodes reach this one. Without it torchrun announces
            this host's name, which the others may not be able to resolve.
        rendezvous_id: the same on all nodes, another one in every start.
        max_restarts: times that all ranks are started anew after one has failed.

    Raises:
        ValueError: several nodes, but no `master`.
    """
    meeting: tuple[str, ...] = ("--standalone",)
    if nodes > 1:
        if master is None:
            raise ValueError(f"{nodes} nodes need an endpoint to meet at")
        meeting = (
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={master}",
            f"--rdzv-id={rendezvous_id or 'mpotrain'}",
            # Told so, node 0 need not find out from its host name that it is the first.
            f"--rdzv-conf=is_host={int(node_rank == 0)}",
            f"--node-rank={node_rank}",
            *((f"--local-addr={own_address}",) if own_address is not None else ()),
        )
    if max_restarts > 0 and module[0] == "mpotrain":
        # torchrun takes every exit code for a failure, also that of a stop on request.
        module = ("launcher.rank", *module[1:])
    return (
        python, "-m", "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks_per_node}",
        *meeting,
        f"--max-restarts={max_restarts}",
        "-m", *module,
    )  # fmt: skip


def deepspeed_command(
    python: str,
    module: Sequence[str],
    *,
    hosts: Mapping[str, int],
    node_rank: int = 0,
    master: Endpoint,
) -> tuple[str, ...]:
    """Return the command of DeepSpeed's per-node launcher, as `deepspeed --no_ssh` runs it.

    Args:
        python: interpreter.
        module: what ranks run, see `module_argv`.
        hosts: ranks by host, in the order of their ranks.
        node_rank: number of this host among them.
        master: where ranks meet.
    """
    world = {host: list(range(ranks)) for host, ranks in hosts.items()}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    return (
        python, "-u", "-m", "deepspeed.launcher.launch",
        f"--world_info={encoded}",
        f"--node_rank={node_rank}",
        f"--master_addr={master.address}",
        f"--master_port={master.port}",
        "--no_local_rank",
        "--log_level=warning",
        "--module", *module,
    )  # fmt: skip


def deepspeed_over_ssh_command(
    python: str, module: Sequence[str], *, hostfile: str, master: Endpoint | None = None
) -> tuple[str, ...]:
    """Return the command that starts all hosts of a hostfile from here, through pdsh and ssh.

    Args:
        python: interpreter, at the same path on all hosts.
        module: what ranks run, see `module_argv`. DeepSpeed writes it into a shell line of the
            remote hosts: the caller refuses what a shell would not take literally.
        hostfile: lines `HOST slots=RANKS`.
        master: where ranks meet; by default DeepSpeed asks the first host for its address.
    """
    meeting = (f"--master_addr={master.address}", f"--master_port={master.port}") if master else ()
    return (
        python, "-m", "deepspeed.launcher.runner",
        f"--hostfile={hostfile}",
        *meeting,
        # Without it a single host is taken for this machine, whatever its name.
        "--force_multi",
        "--no_local_rank",
        "--module", *module,
    )  # fmt: skip
