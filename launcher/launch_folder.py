"""What a submission leaves in the run folder: enough to say later what ran, and to run it again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.launch_error import LaunchError
from launcher.life_log import LifeLog
from launcher.run_folder import LAUNCH, LIVES_FILE, RUN_FILE, SUBMISSION_FILE
from launcher.slurm_names import LOGS
from mpotrain.durable import storage_errors, write_durably

CLUSTER_FILE = "cluster.toml"
DIFF_FILE = "git.diff"
PLAN_FILE = "plan.txt"
LOCK_FILE = ".submitting"


class LaunchFolder:
    """The folder `launch` of a run.

    Attributes:
        run: the run folder.
        path: the folder.
    """

    def __init__(self, run: Path) -> None:
        """Name the folder; nothing is written yet.

        Args:
            run: the run folder, an absolute path.
        """
        self.run = run
        self.path = run / LAUNCH

    @property
    def run_file(self) -> Path:
        """The resolved run file."""
        return self.path / RUN_FILE

    @property
    def cluster_file(self) -> Path:
        """The resolved cluster file."""
        return self.path / CLUSTER_FILE

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep any other submission of this run away.

        Raises:
            LaunchError: there is one at this moment.
            StorageError: the folder cannot be written.
        """
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.run / LOGS).mkdir(exist_ok=True)
            handle = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LaunchError(
                    f"{self.run}: this run is being submitted by another process right now"
                ) from error
            except OSError:
                pass  # A file system without locks: the queue is asked all the same.
            yield
        finally:
            os.close(handle)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files, and delete those of an earlier submission that this one does not have.

        Args:
            files: content by name.

        Raises:
            StorageError: the folder cannot be written.
        """
        for name, content in files.items():
            write_durably(self.path / name, content)
        for name in {DIFF_FILE, PLAN_FILE} - files.keys():
            with storage_errors(self.path / name):
                (self.path / name).unlink(missing_ok=True)

    def record(self, submission: Mapping[str, Any], life: int) -> None:
        """Write down that a job was submitted.

        Args:
            submission: content of the record; it names `job_id`, `user` and `host`.
            life: number of the job's first life.

        Raises:
            StorageError: the folder cannot be written.
        """
        content = json.dumps(submission, indent=1) + "\n"
        try:
            write_durably(self.path / SUBMISSION_FILE, content.encode())
        finally:  # one of the two is enough to find the job
            LifeLog(self.run).append(
                "submitted",
                job_id=submission["job_id"],
                life=life,
                detail=f"by {submission['user']} on {submission['host']}",
            )

    def discard(self) -> None:
        """Take back what a submission that failed has written, unless the run was there before."""
        if (self.path / SUBMISSION_FILE).exists() or (self.path / LIVES_FILE).exists():
            return
        for name in (RUN_FILE, CLUSTER_FILE, DIFF_FILE, PLAN_FILE, LOCK_FILE):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path, self.run / LOGS, self.run):
            with contextlib.suppress(OSError):  # it holds something else
                folder.rmdir()
