"""`python -m launcher torchrun`: the ranks of this host, alone or as one of several."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from launcher.addresses import own_address, parse_endpoint
from launcher.commands import Command, module_argv, rank_environment, torchrun_command
from launcher.foreground import pass_to_ranks, run_and_pass
from launcher.start_here import StartHere, add_run_arguments, exit_code, read_start, show
from mpotrain.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_run_arguments(parser)
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks on every host")
    parser.add_argument("--nodes", type=int, metavar="N", help="hosts; start this on each of them")
    parser.add_argument(
        "--node-rank", type=int, default=0, metavar="R", help="number of this host, from 0"
    )
    parser.add_argument("--master", metavar="ADDR[:PORT]", help="host 0, where all hosts meet")
    parser.add_argument(
        "--rendezvous-id",
        metavar="ID",
        help="tells this start from others at the same address (default: name of the run)",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="times that all ranks start anew, from the newest checkpoint, after one has failed",
    )


def main(options: argparse.Namespace) -> int:
    """Run the ranks of this host.

    Raises:
        MpotrainError: they cannot be started.
    """
    start = read_start(options)
    command = torchrun_here(start, options)
    if options.dry_run:
        return show(start, command)
    start.refuse_stopped()
    started = time.time()
    return exit_code(start.folder, started, run_and_pass(command, pass_to_ranks))


def torchrun_here(start: StartHere, options: argparse.Namespace) -> Command:
    """Return the command of this host.

    Raises:
        ConfigError: the options contradict each other or the run.
    """
    machine = start.machine
    if options.max_restarts is not None:
        lives = replace(machine.lives, worker_restarts=options.max_restarts)
        machine = replace(machine, lives=lives)
    nodes = machine.nodes if options.nodes is None else options.nodes
    restarts = machine.lives.worker_restarts
    problems = start.ranks_problems(options.ranks_per_node) + _problems(options, nodes, restarts)
    if problems:
        raise ConfigError([f"command line: {problem}" for problem in problems])
    ranks = start.local_ranks(options.ranks_per_node)
    start.check(nodes * ranks)
    master = None if options.master is None else parse_endpoint(options.master)
    module = module_argv(start.task, str(start.run_file), start.overrides)
    argv = torchrun_command(
        machine.rank_interpreter,
        module,
        ranks_per_node=ranks,
        nodes=nodes,
        node_rank=options.node_rank,
        master=master,
        own_address=None if master is None else own_address(master),
        rendezvous_id=options.rendezvous_id or start.run.name,
        max_restarts=restarts,
    )
    return Command(machine.container.inside(argv), rank_environment(machine))


def _problems(options: argparse.Namespace, nodes: int, restarts: int) -> list[str]:
    found = []
    if nodes < 1:
        found.append(f"--nodes: must be at least 1, is {nodes}")
    if restarts < 0:
        found.append(f"--max-restarts: must not be negative, is {restarts}")
    if nodes > 1 and options.master is None:
        found.append(f"--master: {nodes} hosts meet at the address of host 0; name it on all")
    if nodes >= 1 and not 0 <= options.node_rank < nodes:
        found.append(
            f"--node-rank: {options.node_rank} is not in 0 ... {nodes - 1}; every host has its own"
        )
    return found
