"""`python -m launcher agent`: torchrun or DeepSpeed's launcher on one node of a SLURM step.

srun starts one on every node. What SLURM sends to a step reaches this process, and on most clusters
no other one of the node: a cgroup passes signals to tasks, not to their children. It hands them on
to the ranks and keeps them from the launcher in between, which would die of SIGUSR1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from launcher.addresses import own_address, parse_endpoint
from launcher.commands import Command, deepspeed_command, module_argv, torchrun_command
from launcher.foreground import pass_to_ranks, run_and_pass
from mpotrain.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; `launcher.slurm_commands.agent_argv` writes them."""
    parser.add_argument("flavour", choices=["torchrun", "deepspeed"])
    parser.add_argument("run", metavar="RUN", help="run file, a path that all nodes see")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--task", choices=["train", "tune"], default="train")
    parser.add_argument(
        "--nodes", required=True, metavar="NAME,...", help="all nodes, in the order of their ranks"
    )
    parser.add_argument("--ranks-per-node", type=int, required=True, metavar="N")
    parser.add_argument("--master", required=True, metavar="ADDR:PORT", help="the first node")
    parser.add_argument("--rendezvous-id", required=True, metavar="ID")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N")


def main(options: argparse.Namespace) -> int:
    """Run the launcher of this node to its end.

    Returns:
        Its exit code.

    Raises:
        MpotrainError: it cannot be started.
    """
    return run_and_pass(node_command(options, os.environ), pass_to_ranks)


def node_command(options: argparse.Namespace, environ: Mapping[str, str]) -> Command:
    """Return the launcher's command on this node.

    Args:
        options: see `add_arguments`.
        environ: usually `os.environ`; srun has set SLURM_NODEID in it.

    Raises:
        ConfigError: the options contradict each other, or the number of the node is missing.
    """
    nodes = [name for name in options.nodes.split(",") if name]
    node_rank = _node_rank(environ, len(nodes))
    master = parse_endpoint(options.master)
    module = module_argv(options.task, options.run, tuple(options.overrides))
    if options.flavour == "deepspeed":
        hosts = dict.fromkeys(nodes, options.ranks_per_node)
        argv = deepspeed_command(
            sys.executable, module, hosts=hosts, node_rank=node_rank, master=master
        )
        return Command(argv)
    argv = torchrun_command(
        sys.executable,
        module,
        ranks_per_node=options.ranks_per_node,
        nodes=len(nodes),
        node_rank=node_rank,
        master=master,
        own_address=own_address(master),
        rendezvous_id=options.rendezvous_id,
        max_restarts=options.max_restarts,
    )
    return Command(argv)


def _node_rank(environ: Mapping[str, str], num_nodes: int) -> int:
    text = environ.get("SLURM_NODEID", "")
    problem = ""
    if not (text.isascii() and text.isdigit()):
        problem = "is not the number of a node; start the agent with srun"
    elif int(text) >= num_nodes:
        problem = f"but --nodes names {num_nodes} nodes"
    if problem:
        raise ConfigError([f"command line: SLURM_NODEID={text!r}: {problem}"])
    return int(text)
