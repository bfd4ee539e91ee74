"""`python -m launcher batch`: what a batch script of SLURM runs, from the first node of the job."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.allocation import allocation_of
from launcher.batch_run import BatchRun
from launcher.cluster import load_cluster
from launcher.commands import Task
from launcher.inbox import SignalInbox
from launcher.job_size import cluster_of, job_size, sized
from launcher.journal import PATIENT_ATTEMPTS, PAUSE_SECONDS
from launcher.plan_check import load_run
from launcher.restart import NewJob
from launcher.rival import lock_patience
from launcher.run_arguments import add_run
from launcher.slurm_control import SlurmControl
from launcher.supervisor import Supervisor
from mpotrain.config import dump_config

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_run(
        parser,
        without_cluster="; without one the job's own options say how many ranks to start",
    )
    parser.add_argument(
        "--continues",
        metavar="JOBID",
        help="the job whose place this one takes; written by the launcher itself",
    )


def main(options: argparse.Namespace) -> int:
    """Run one life of a run inside its job.

    Returns:
        0 where the run is done or goes on in another life; 85 where it was stopped on request; 1
        where it was given up.

    Raises:
        MpotrainError: there is no job here, or its files are wrong; nothing was started.
    """
    return run_batch(
        options.run,
        options.cluster,
        task=options.task,
        overrides=tuple(options.overrides),
        continues=options.continues,
    )


def run_batch(
    run_file: Path,
    cluster_file: Path | None,
    *,
    task: Task = "train",
    overrides: Sequence[str] = (),
    continues: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Run one life of a run inside its job; see `main`.

    Args:
        run_file: run file.
        cluster_file: cluster file; None derives one from the job.
        task: sub-command of mpotrain.
        overrides: `dotted.key=value` lines.
        continues: the job whose place this one takes.
        environ: variables of the job.

    Returns:
        The exit code of the batch script.

    Raises:
        MpotrainError: there is no job here, or its files are wrong; nothing was started.
    """
    # From the first instant on: SLURM's default for a signal would end the script with the ranks.
    with SignalInbox() as inbox:
        try:
            allocation = allocation_of(environ)
            _log_to_stdout(allocation.job_id)
            if allocation.restart_count or continues:
                await_files([path for path in (run_file, cluster_file) if path is not None])
            run = load_run(run_file, task, overrides)
            size = job_size(environ)
            if cluster_file is None:
                cluster = cluster_of(size)
            else:
                cluster = sized(load_cluster(cluster_file), size, str(cluster_file))
            here = Path.cwd()
            new_job = NewJob(
                cluster=cluster,
                # That of `--name` or of an array: by it `cancel` finds a job not yet written down.
                name=environ.get("SLURM_JOB_NAME") or run.name,
                task=task,
                run_file=here / run_file,
                cluster_file=None if cluster_file is None else here / cluster_file,
                overrides=tuple(overrides),
                run_folder=here / run.folder,
                working_folder=here,
            )
            last_step = min(run.train.steps, run.train.stop_after or run.train.steps)
            settings = hashlib.sha256(dump_config(run).encode()).hexdigest()[:16]
            patience = lock_patience(run.train.hang_timeout_minutes)
            batch_run = BatchRun(new_job, allocation, last_step, continues, settings, patience)
            control = SlurmControl(allocation.number, allocation.job_id)
            return Supervisor(batch_run, control, inbox).run()
        finally:
            # The exit code is what SLURM shall see of this process, not a signal after the end.
            inbox.ignore_ends()


def await_files(
    paths: Sequence[Path],
    *,
    attempts: int = PATIENT_ATTEMPTS,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until files can be read that an earlier life has read.

    Nobody would start the job again if a file system that is late ended it here.

    Args:
        paths: the files; whoever needs them says what is wrong where they do not come.
        attempts: how often to look, five seconds apart.
        sleep: how to wait.
    """
    for _ in range(attempts - 1):
        try:
            for path in paths:
                path.read_bytes()
        except OSError as error:
            logger.warning("%s cannot be read yet (%s)", path, error.strerror or error)
            sleep(PAUSE_SECONDS)
        else:
            return


def _log_to_stdout(job_id: str) -> None:
    """Let the log of the job tell what the supervisor does, between the lines of the ranks."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [job {job_id}] %(message)s"))
    root = logging.getLogger("launcher")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
