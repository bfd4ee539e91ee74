"""`python -m launcher local`: one process on this machine."""

from __future__ import annotations

import argparse

from launcher.commands import local_command
from launcher.foreground import run_in_place
from launcher.start_here import add_run_arguments, read_start, show
from mpotrain.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_run_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Become the run.

    Raises:
        MpotrainError: it cannot be started.
    """
    start = read_start(options)
    if start.machine.world_size > 1:
        raise ConfigError(
            [
                f"{options.cluster}: {start.machine.nodes} nodes x {start.machine.local_ranks} "
                "ranks, but `local` starts one process; use torchrun, deepspeed or slurm, or "
                "leave --cluster out"
            ]
        )
    start.check(1)
    command = local_command(start.machine, start.task, str(start.run_file), start.overrides)
    if options.dry_run:
        return show(start, command)
    start.refuse_stopped()
    return run_in_place(command)
