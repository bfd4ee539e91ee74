"""`sweep`: submit the cross product of settings, one run for each point."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from launcher.commands import Command
from launcher.dry_run import shell_text
from launcher.planned_point import PlannedPoint
from launcher.run_arguments import add_overrides
from launcher.sbatch_call import UnclearAnswerError
from launcher.slurm_queue import SlurmQueue
from launcher.sweep_file import load_sweep
from launcher.sweep_plan import notes_of, plan_sweep
from launcher.sweep_points import expand
from launcher.sweep_submit import SweepSubmitter
from mpotrain.errors import EXIT_DONE, ConfigError, MpotrainError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sweep`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="sweep file (TOML)")
    add_overrides(parser, "all runs")
    parser.add_argument(
        "--cluster", type=Path, required=True, metavar="FILE", help="cluster file (TOML)"
    )
    parser.add_argument(
        "--array", action="store_true", help="one job array for each stage, not one job each"
    )
    parser.add_argument(
        "--max-running",
        type=int,
        metavar="N",
        help="runs of an array that may run at the same time",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="allow settings of runs that were submitted before to change; none may have a job",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything; write and queue nothing"
    )


def main(options: argparse.Namespace) -> int:
    """Check all points, then submit those that are neither finished nor queued.

    Args:
        options: see `add_arguments`.

    Returns:
        The exit code.

    Raises:
        MpotrainError: a point cannot run (nothing was submitted), or SLURM refuses a job (those
            before it are queued).
    """
    if options.max_running is not None and not options.array:
        raise ConfigError(["--max-running: works with --array alone, whose tasks SLURM counts"])
    if options.max_running is not None and options.max_running < 1:
        raise ConfigError([f"--max-running: must be at least 1, is {options.max_running}"])
    file = load_sweep(options.file)
    queue = SlurmQueue()
    planned = plan_sweep(
        expand(file), options.cluster, options.overrides, queue, update=options.update
    )
    for one in planned:
        if one.action != "submit":
            kept = f"; its settings stay ({'; '.join(one.changed[:5])})" if one.changed else ""
            _print(f"{_name(one)}: {one.state.word}, skipped{kept}")
    for note in notes_of(planned):
        _print(f"note: {note}")
    submitter = SweepSubmitter(
        folder=Path.cwd() / file.sweep.folder,
        queue=queue,
        dry_run=options.dry_run,
        show=_show,
        show_command=_show_command,
    )
    wanted = sum(one.action == "submit" for one in planned)
    try:
        if options.array:
            submitter.submit_arrays(planned, options.max_running)
        else:
            submitter.submit_each(planned)
    except MpotrainError as error:
        if options.dry_run:
            raise
        _print(f"{submitter.num_submitted} of {wanted} runs are in the queue")
        if not isinstance(error, UnclearAnswerError):  # it says what to look at first
            _print("the same command again goes on with the rest")
        raise
    verb = "would be submitted" if options.dry_run else "submitted"
    _print(f"{wanted} of {len(planned)} runs {verb}")
    folder = shlex.quote(file.sweep.folder)
    _print(f"  state    python -m launcher status {folder}")
    _print(f"  cancel   python -m launcher cancel --recursive {folder}")
    return EXIT_DONE


def _show(one: PlannedPoint, job_id: str, after: str) -> None:
    waits = f", waits for {after.partition(':')[2]}" if after else ""
    again = f", goes on ({one.state.word} before)" if one.state.word != "new" else ""
    if one.replaces is not None:
        again = f", in place of job {one.replaces}, which did not wait for it"
    _print(f"{_name(one)}: job {job_id}{waits}{again}")


def _show_command(command: Command) -> None:
    _print(shell_text(command))


def _name(one: PlannedPoint) -> str:
    return str(one.point.folder)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
