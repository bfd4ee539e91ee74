"""`stop`: ask runs to save a checkpoint and end, whoever started them and wherever they run."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from launcher.find_runs import named_run
from launcher.invoker import user_and_host
from launcher.run_state import RunState
from launcher.slurm_queue import SlurmQueue
from launcher.status import gather
from launcher.table import printable
from mpotrain.durable import storage_errors, write_durably
from mpotrain.errors import EXIT_DONE
from mpotrain.train.signals import STOP_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `stop`."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, or files of runs"
    )
    parser.add_argument("--undo", action="store_true", help="take the request back")


def main(options: argparse.Namespace) -> int:
    """Write the stop files of all runs that were named, or take them back.

    Args:
        options: see `add_arguments`.

    Returns:
        The exit code.

    Raises:
        ConfigError: a run does not exist.
        StorageError: a file cannot be written or deleted.
    """
    folders = [named_run(path) for path in options.runs]
    if options.undo:
        for folder in folders:
            taken = withdraw_stop(folder)
            _say(folder, "goes on: the stop file is gone" if taken else "nobody asked for a stop")
        return EXIT_DONE
    runs, _ = gather(folders, SlurmQueue())
    for record, state in runs:
        if state.has_ended:
            # The file would stay, and stop the next start at its first step.
            _say(record.folder, f"is {state.word} already; nothing to stop")
        else:
            request_stop(record.folder, "stop")
            _say(record.folder, _what_follows(state))
    return EXIT_DONE


def _what_follows(state: RunState) -> str:
    """Say what a run that was asked to stop does."""
    saves = "saves a checkpoint after the step it is at, and ends"
    if state.word == "running":
        return saves
    if state.word in ("unknown", "damaged"):
        return (
            f"is asked to stop; if it runs, it {saves}. Whether it does is unknown: {state.detail}"
        )
    return f"is {state.word} now: it stops as soon as it runs; `stop --undo` takes that back"


def request_stop(folder: Path, command: str) -> None:
    """Write the stop file of a run.

    Args:
        folder: run folder.
        command: who writes it, for people.

    Raises:
        StorageError: it cannot be written.
    """
    when = time.strftime("%Y-%m-%d %H:%M:%S%z")
    write_durably(folder / STOP_FILE, f"{command} by {user_and_host()} at {when}\n".encode())


def withdraw_stop(folder: Path) -> bool:
    """Delete the stop file of a run; whether there was one.

    Raises:
        StorageError: it cannot be deleted.
    """
    path = folder / STOP_FILE
    with storage_errors(path):
        try:
            path.unlink()
        except FileNotFoundError:
            return False
    return True


def _say(folder: Path, text: str) -> None:
    sys.stdout.write(printable(f"{folder}: {text}") + "\n")
