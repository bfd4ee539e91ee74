"""`python -m launcher deepspeed`: the ranks of this host, or of all hosts of a hostfile."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

from launcher.addresses import DEFAULT_PORT, parse_endpoint
from launcher.commands import (
    Command,
    Endpoint,
    deepspeed_command,
    deepspeed_over_ssh_command,
    module_argv,
    rank_environment,
)
from launcher.foreground import Pass, pass_to_ranks, run_and_pass
from launcher.hostfile import read_hostfile
from launcher.launch_error import LaunchError
from launcher.remote_shell import dropped_variables, remote_problems
from launcher.start_here import StartHere, add_run_arguments, exit_code, read_start, show
from mpotrain.errors import EXIT_DONE, ConfigError
from mpotrain.train.signals import STOP_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_run_arguments(parser)
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="ranks on this host (without --hostfile)"
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="lines `HOST slots=RANKS`; all hosts are started from here through pdsh and ssh",
    )
    parser.add_argument(
        "--node-rank",
        type=int,
        metavar="R",
        help="start only the ranks of line R of the hostfile, from 0, without ssh; do so on each",
    )
    parser.add_argument("--master", metavar="ADDR[:PORT]", help="the first host, where ranks meet")


def main(options: argparse.Namespace) -> int:
    """Run the ranks.

    Raises:
        MpotrainError: they cannot be started.
    """
    start = read_start(options)
    over_ssh = options.hostfile is not None and options.node_rank is None
    command = _over_ssh(start, options) if over_ssh else deepspeed_here(start, options)
    if options.dry_run:
        show(start, command)
    else:
        start.refuse_stopped()
    if over_ssh and shutil.which("pdsh") is None:
        raise LaunchError(
            "pdsh is not installed here; install it, or start every host of the hostfile by hand "
            "with --node-rank"
        )
    if options.dry_run:
        return EXIT_DONE
    pass_on = _by_file(start) if over_ssh else pass_to_ranks
    started = time.time()
    return exit_code(start.folder, started, run_and_pass(command, pass_on))


def deepspeed_here(start: StartHere, options: argparse.Namespace) -> Command:
    """Return the command of this host.

    Raises:
        ConfigError: the options contradict each other or the run.
    """
    machine, hosts = start.machine, _hosts(start, options)
    node_rank = options.node_rank or 0
    if not 0 <= node_rank < len(hosts):
        last = len(hosts) - 1
        raise ConfigError(
            [f"command line: --node-rank: {node_rank} is not in 0 ... {last}, the hosts there are"]
        )
    start.check(sum(hosts.values()))
    master = Endpoint(next(iter(hosts)), DEFAULT_PORT)
    if len(hosts) == 1 and options.hostfile is None:
        master = Endpoint("127.0.0.1", DEFAULT_PORT)
    if options.master is not None:
        master = parse_endpoint(options.master)
    module = module_argv(start.task, str(start.run_file), start.overrides)
    argv = deepspeed_command(
        machine.rank_interpreter, module, hosts=hosts, node_rank=node_rank, master=master
    )
    return Command(machine.container.inside(argv), rank_environment(machine))


def _over_ssh(start: StartHere, options: argparse.Namespace) -> Command:
    machine = start.machine
    start.check(sum(_hosts(start, options).values()))
    argv = deepspeed_over_ssh_command(
        machine.rank_interpreter,
        module_argv(start.task, str(start.run_file), start.overrides),
        hostfile=str(options.hostfile.absolute()),
        master=None if options.master is None else parse_endpoint(options.master),
    )
    environment = rank_environment(machine)
    if machine.container.inside(()) != ():
        raise ConfigError(
            [
                f"{options.cluster}: container: DeepSpeed starts the other hosts through ssh, "
                "outside of any container; start each host by hand with --node-rank"
            ]
        )
    if problems := remote_problems(argv, Path.cwd(), {**os.environ, **environment}):
        raise ConfigError(problems)
    if dropped := dropped_variables(machine.environment | environment):
        print(
            f"note: ssh does not take {', '.join(dropped)} along; write them into "
            "~/.deepspeed_env on this host if other hosts need them",
            file=sys.stderr,
        )
    return Command(argv, environment)


def _hosts(start: StartHere, options: argparse.Namespace) -> dict[str, int]:
    if options.hostfile is not None:
        if options.ranks_per_node is not None:
            raise ConfigError(
                ["command line: --ranks-per-node: the hostfile says how many (slots=N)"]
            )
        return read_hostfile(options.hostfile)
    if start.machine.nodes > 1:
        raise ConfigError(
            [f"{options.cluster}: nodes: {start.machine.nodes}; name the hosts with --hostfile"]
        )
    if problems := start.ranks_problems(options.ranks_per_node):
        raise ConfigError([f"command line: {problem}" for problem in problems])
    return {"localhost": start.local_ranks(options.ranks_per_node)}


def _by_file(start: StartHere) -> Pass:
    """Return what asks ranks on other hosts, which no signal reaches, to stop."""

    def pass_on(launcher: psutil.Process, number: signal.Signals) -> bool:
        del launcher, number
        start.folder.mkdir(parents=True, exist_ok=True)
        (start.folder / STOP_FILE).touch()
        return True

    return pass_on
