"""What the batch script of a job array runs: one task finds its run and becomes its supervisor.

`python -m launcher.array_task INDEX`: from here on everything is as for a job of its own, the log
in the run folder included. A task that SLURM has started again waits for its files: nobody would
start it once more if a mount that is late ended it here.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from launcher.allocation import count
from launcher.batch import await_files
from launcher.journal import PATIENT_ATTEMPTS, PAUSE_SECONDS
from launcher.launch_error import LaunchError
from launcher.launch_folder import LaunchFolder
from launcher.slurm_names import log_path
from launcher.sweep_array import ArrayTask, read_task
from mpotrain.durable import storage_errors
from mpotrain.errors import EXIT_BAD_INPUT, MpotrainError, StorageError

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> NoReturn:
    """Turn this process into the supervisor of its run, or end it with an error.

    Args:
        arguments: the index file.
    """
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m launcher.array_task INDEX\n")
        sys.exit(EXIT_BAD_INPUT)
    try:
        job_id, number = task_of(os.environ)
        attempts = PATIENT_ATTEMPTS if count(os.environ, "SLURM_RESTART_COUNT") else 1
        await_files([Path(arguments[0])], attempts=attempts)
        task = read_task(Path(arguments[0]), number)
        write_to(log_path(task.folder, job_id), attempts=attempts)
    except MpotrainError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    # The process stays the same: SLURM's signals to the batch script reach the supervisor.
    command = batch_argv(task)
    os.execv(command[0], command)


def task_of(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return the job id (`123_4`) and the number of the array task that this process is.

    Raises:
        LaunchError: it is none.
    """
    array, number = environ.get("SLURM_ARRAY_JOB_ID", ""), environ.get("SLURM_ARRAY_TASK_ID", "")
    if not (array.isdecimal() and number.isdecimal()):
        raise LaunchError(
            "SLURM_ARRAY_JOB_ID and SLURM_ARRAY_TASK_ID are not set: this is what the batch "
            "script of a job array runs; submit one with `python -m launcher sweep --array`"
        )
    return f"{array}_{number}", int(number)


def write_to(log: Path, *, attempts: int = 1, sleep: Callable[[float], None] = time.sleep) -> None:
    """Append all that this process and its children print from now on to a file.

    Args:
        log: the file.
        attempts: how often to try, five seconds apart.
        sleep: how to wait.

    Raises:
        StorageError: it cannot be opened.
    """
    for _ in range(attempts - 1):
        try:
            handle = _opened(log)
            break
        except StorageError as error:
            logger.warning("%s: tried again", error)
            sleep(PAUSE_SECONDS)
    else:
        handle = _opened(log)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


def _opened(log: Path) -> int:
    with storage_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def batch_argv(task: ArrayTask) -> list[str]:
    """Return the command of the supervisor of a run."""
    launch = LaunchFolder(task.folder)
    files = [str(launch.run_file), f"--cluster={launch.cluster_file}"]
    return [sys.executable, "-m", "launcher", "batch", *files, f"--task={task.task}"]


if __name__ == "__main__":
    main(sys.argv[1:])
