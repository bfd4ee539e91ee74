"""Many runs as one job array: the sbatch command, and the index by which tasks find their runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from launcher.commands import Command, Task
from launcher.launch_error import LaunchError
from launcher.slurm_commands import sbatch_options
from launcher.slurm_names import job_name
from launcher.submission import SOURCE, Submission
from mpotrain.durable import storage_errors, write_durably

SWEEP_FOLDER = ".sweep"
"""Folder in the sweep's folder: indices of arrays, and what tasks say before they know their run
folder."""


@dataclass(frozen=True)
class ArrayTask:
    """What one task of an array runs.

    Attributes:
        folder: run folder, an absolute path.
        task: what the run does.
    """

    folder: Path
    task: Task


def array_command(
    submission: Submission,
    *,
    name: str,
    index: Path,
    num_tasks: int,
    max_running: int | None = None,
    after: str = "",
) -> Command:
    """Return the command that submits a job array.

    Args:
        submission: one of the runs; all have the same cluster file.
        name: name of the array.
        index: file in which tasks find their runs, an absolute path.
        num_tasks: number of tasks.
        max_running: tasks that may run at the same time; None for any number.
        after: dependency in the words of sbatch; empty for none.

    Raises:
        LaunchError: the batch script is missing.
    """
    # The log of a run lies in its run folder, which only the task itself knows.
    log = str(index.parent).replace("%", "%%") + "/%A_%a.log"
    options = sbatch_options(
        submission.cluster,
        name=job_name(name),
        log=log,
        folder=str(submission.working_folder),
        after=after or None,
    )
    at_once = "" if max_running is None else f"%{max_running}"
    array = f"--array=0-{num_tasks - 1}{at_once}"
    argv = ("sbatch", *options, array, str(array_script()), str(index))
    return Command(argv, submission.command.environment)


def array_script() -> Path:
    """Return the batch script of arrays.

    Raises:
        LaunchError: it does not lie beside the package.
    """
    script = SOURCE / "slurm" / "array.sbatch"
    if not script.is_file():
        raise LaunchError(
            f"{script}: the batch script is missing; install the project from its work tree "
            "(pip install --editable)"
        )
    return script


def write_index(path: Path, tasks: Sequence[ArrayTask]) -> None:
    """Write the index of an array; it is read whenever a task starts, requeued ones included.

    Raises:
        StorageError: it cannot be written.
    """
    content = {"tasks": [{"folder": str(one.folder), "task": one.task} for one in tasks]}
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def read_task(path: Path, number: int) -> ArrayTask:
    """Return what a task runs.

    Args:
        path: the index.
        number: of the task in its array.

    Raises:
        LaunchError: the index cannot be read, or has no such task.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LaunchError(f"{path}: cannot be read ({error}); submit the sweep again") from error
    tasks: Any = content.get("tasks") if isinstance(content, Mapping) else None
    entry = tasks[number] if isinstance(tasks, list) and 0 <= number < len(tasks) else None
    folder = entry.get("folder") if isinstance(entry, Mapping) else None
    task = entry.get("task") if isinstance(entry, Mapping) else None
    if not isinstance(folder, str) or task not in get_args(Task):
        raise LaunchError(f"{path}: has no task {number}; submit the sweep again")
    return ArrayTask(Path(folder), "tune" if task == "tune" else "train")
