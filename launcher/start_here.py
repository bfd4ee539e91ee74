"""What starts on this machine have in common: a run, an optional cluster file, an exit code."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster import ClusterConfig, load_cluster
from launcher.commands import Command, Task
from launcher.containers import PyxisContainer
from launcher.dry_run import shell_text
from launcher.launch_error import LaunchError
from launcher.life_log import read_outcome
from launcher.plan_check import check_plan, load_run
from launcher.run_arguments import add_run
from launcher.run_folder import OUTCOME_FILE
from mpotrain.config import RunSettings
from mpotrain.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from mpotrain.train.signals import STOP_FILE


@dataclass(frozen=True, kw_only=True)
class StartHere:
    """A run that is to be started on this machine.

    Attributes:
        run: the resolved run.
        run_file: its file, an absolute path.
        overrides: `dotted.key=value` lines.
        task: what the run does.
        cluster: the cluster file; None where none was given.
    """

    run: RunSettings
    run_file: Path
    overrides: tuple[str, ...]
    task: Task
    cluster: ClusterConfig | None

    @property
    def machine(self) -> ClusterConfig:
        """The cluster file, or one that says nothing."""
        return self.cluster or ClusterConfig()

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path.cwd() / self.run.folder

    def check(self, world_size: int) -> None:
        """Refuse a run that cannot start with so many ranks, and say what its plan notes.

        Raises:
            ConfigError: with every reason.
            CheckpointError: the run folder has a checkpoint of another model.
        """
        plan = check_plan(self.run, world_size, str(self.run_file), self.cluster)
        for note in dict.fromkeys(plan.notes):
            # What a dry run prints to stdout is a shell line.
            print(f"note: {note}", file=sys.stderr, flush=True)

    def refuse_stopped(self) -> None:
        """Refuse a run with a stop file, which the run would obey at its first step.

        Raises:
            LaunchError: there is one.
        """
        path = self.folder / STOP_FILE
        if path.exists():
            raise LaunchError(
                f"{path}: the stop file is there, so the run would save and leave before its first "
                "step; take it back first (python -m launcher stop --undo "
                f"{shlex.quote(str(self.folder))})"
            )

    def local_ranks(self, asked: int | None) -> int:
        """Return the ranks of this host.

        Args:
            asked: value of `--ranks-per-node`; None leaves it to the cluster file.
        """
        return self.machine.local_ranks if asked is None else asked

    def ranks_problems(self, asked: int | None) -> list[str]:
        """Return why that is no number of ranks, beginning with the option.

        Args:
            asked: see `local_ranks`.
        """
        if asked is not None and asked < 1:
            return [f"--ranks-per-node: must be at least 1, is {asked}"]
        if asked is None and self.cluster is None:
            return [
                "--ranks-per-node: say how many ranks to start here, or name a cluster file "
                "(--cluster)"
            ]
        return []


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all starts on this machine have."""
    add_run(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the command; start nothing")


def read_start(options: argparse.Namespace) -> StartHere:
    """Read the files that the options name.

    Raises:
        ConfigError: with every mistake in them.
    """
    cluster = None if options.cluster is None else load_cluster(options.cluster)
    if cluster is not None and isinstance(cluster.container, PyxisContainer):
        raise ConfigError(
            [
                f'{options.cluster}: container.kind: "pyxis" is a plug-in of srun; on a machine '
                'without SLURM use "apptainer", or no container'
            ]
        )
    return StartHere(
        run=load_run(options.run, options.task, options.overrides),
        run_file=options.run.absolute(),
        overrides=tuple(options.overrides),
        task=options.task,
        cluster=cluster,
    )


def show(start: StartHere, command: Command) -> int:
    """Print a command instead of starting it.

    Raises:
        LaunchError: the command would not be started.
    """
    print(shell_text(command), flush=True)
    start.refuse_stopped()
    return EXIT_DONE


def exit_code(folder: Path, started: float, code: int) -> int:
    """Return how a start ended, from its outcome file rather than from its launcher.

    Launchers turn every exit code of a rank into their own.

    Args:
        folder: run folder.
        started: when it was started, in seconds since 1970.
        code: exit code of the launcher.
    """
    try:
        written = (folder / OUTCOME_FILE).stat().st_mtime
    except OSError:
        return code
    outcome = read_outcome(folder)
    # File systems round times, and those of other machines go wrong by a little.
    if outcome is None or written < started - 2:
        return code
    if outcome.exit_code is not None:
        return outcome.exit_code
    return EXIT_STOPPED if outcome.outcome == "resume" else code
