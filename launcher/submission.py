"""From a run file and a cluster file to a job in SLURM's queue."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.cluster import ClusterConfig, dump_cluster, load_cluster
from launcher.commands import Command, Task
from launcher.dependencies import dependency, jobs_before, require_known
from launcher.invoker import user_name
from launcher.launch_error import LaunchError
from launcher.launch_folder import DIFF_FILE, PLAN_FILE, LaunchFolder
from launcher.plan_check import PlanCheck, check_plan, load_run
from launcher.run_folder import LAUNCH, RunRecord
from launcher.run_reader import read_run
from launcher.saved_run import refuse_finished
from launcher.sbatch_call import UnclearAnswerError, rehearse_sbatch, run_sbatch
from launcher.slurm_commands import sbatch_command, sbatch_options
from launcher.slurm_names import job_name, log_path, log_pattern
from launcher.slurm_queue import SlurmQueue
from mpotrain.checkpoint.manifest_file import library_versions
from mpotrain.config import RunSettings, dump_config
from mpotrain.errors import ConfigError, MpotrainError, StorageError
from mpotrain.provenance import git_diff, git_state
from mpotrain.train.signals import STOP_FILE

SOURCE = Path(__file__).resolve().parent.parent
"""Folder of the packages; in a work tree also that of the batch scripts."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person wants to be submitted.

    Attributes:
        run_file: file of the run.
        cluster_file: file of the cluster.
        overrides: `dotted.key=value` lines laid over the run file.
        task: what the run does.
        name: name of the job; None takes that of the run.
        after: jobs that must end first, `JOBID[:ok|any]` each, with commas between them: well,
            or anyhow.
    """

    run_file: Path
    cluster_file: Path
    overrides: tuple[str, ...] = ()
    task: Task = "train"
    name: str | None = None
    after: str | None = None


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that can be submitted; nothing was written yet.

    Attributes:
        run: the resolved run.
        cluster: the cluster.
        folder: run folder, an absolute path.
        working_folder: where the job runs; relative paths of the run file begin there.
        command: the command that submits it.
        plan: what the plan says of the run.
        task: what the run does.
        waits_for: jobs that a person wants to have ended first.
    """

    run: RunSettings
    cluster: ClusterConfig
    folder: Path
    working_folder: Path
    command: Command
    plan: PlanCheck
    task: Task
    waits_for: tuple[str, ...] = ()


def prepare(request: Request) -> Submission:
    """Read, resolve and check everything that a job needs.

    Args:
        request: what is wanted.

    Returns:
        The job, ready to be submitted.

    Raises:
        ConfigError: a file is wrong, or the run cannot run on this cluster.
        CheckpointError: the run folder has a checkpoint of another model.
        LaunchError: the batch script is missing.
    """
    cluster = load_cluster(request.cluster_file)
    run = load_run(request.run_file, request.task, request.overrides)
    plan = check_plan(run, cluster.world_size, str(request.run_file), cluster)
    working_folder = Path.cwd()
    folder = working_folder / run.folder
    if problems := _path_problems({"folder": folder, "working directory": working_folder}):
        raise ConfigError([f"{request.run_file}: {problem}" for problem in problems])
    hidden = [path for path in (working_folder, folder) if not cluster.container.shows(path)]
    notes = [f"{path}: is in none of container.mounts; ranks work there" for path in hidden]
    launch = LaunchFolder(folder)
    options = sbatch_options(
        cluster,
        name=job_name(run.name if request.name is None else request.name),
        log=log_pattern(folder),
        folder=str(working_folder),
        after=None if request.after is None else dependency(request.after),
    )
    command = sbatch_command(
        cluster,
        str(train_script()),
        str(launch.run_file),
        str(launch.cluster_file),
        options=options,
        task=request.task,
    )
    return Submission(
        run=run,
        cluster=cluster,
        folder=folder,
        working_folder=working_folder,
        command=command,
        plan=replace(plan, notes=(*plan.notes, *notes)),
        task=request.task,
        waits_for=() if request.after is None else jobs_before(request.after),
    )


def submit(submission: Submission, queue: SlurmQueue | None = None) -> str:
    """Queue a job and leave in the run folder what it was.

    A run folder that cannot take the record of a job that SLURM has taken is a warning.

    Args:
        submission: the job.
        queue: SLURM's queue.

    Returns:
        The job id.

    Raises:
        LaunchError: there is no SLURM here, it refuses, the run still has a job, or SLURM does not
            know the jobs to wait for.
        StorageError: the run folder cannot be written.
    """
    if not has_slurm():
        raise LaunchError(
            "sbatch is not installed here: submit on a login node of the cluster, or look at "
            "the job with --dry-run"
        )
    require_known(submission.waits_for)
    launch = LaunchFolder(submission.folder)
    with launch.claimed():
        try:
            record = read_run(submission.folder)
            refuse_active(record, queue or SlurmQueue())
            launch.write(launch_files(submission))
            job_id = run_sbatch(submission.command)
        except MpotrainError as error:
            if not isinstance(error, UnclearAnswerError):
                launch.discard()
            raise
        record_submission(submission, job_id, record.num_starts)
    return job_id


def rehearse(submission: Submission, queue: SlurmQueue | None = None) -> list[str]:
    """Refuse what would be refused if the job were submitted now.

    Args:
        submission: the job.
        queue: SLURM's queue.

    Returns:
        What could not be looked up, because there is no SLURM here.

    Raises:
        LaunchError: the job would be refused.
    """
    record = read_run(submission.folder)
    refuse_finished(submission.run, submission.folder)
    if has_slurm():
        require_known(submission.waits_for)
        refuse_active(record, queue or SlurmQueue())
        rehearse_sbatch(submission.command)
        return []
    refuse_stopped(record)
    asked = [*record.job_ids[-1:], *submission.waits_for]
    found = f" whether job {', '.join(asked)} is in the queue," if asked else ""
    return [f"sbatch is not installed here:{found} and whether SLURM takes the job, is not known"]


def has_slurm() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def refuse_active(record: RunRecord, queue: SlurmQueue) -> None:
    """Make sure that a run has no job, and nothing that would stop a new one at once.

    Raises:
        LaunchError: it has, or nobody can tell.
    """
    unread = [text for text in record.damaged if text.startswith(f"{LAUNCH}/")]
    if unread and not record.job_ids:
        raise LaunchError(
            f"{record.folder}: cannot tell whether this run has a job: {'; '.join(unread)}; make "
            "sure that it has none (squeue --me), then mend or delete the file"
        )
    answer = queue.jobs(record.job_ids)
    if not answer.known:
        raise LaunchError(
            f"{record.folder}: cannot tell whether job {record.job_ids[-1]} of this run is still "
            f"in the queue: {answer.problem}"
        )
    active = [job for job in answer.jobs.values() if job.is_active]
    if active:
        job, folder = active[0], shlex.quote(str(record.folder))
        raise LaunchError(
            f"{record.folder}: job {job.job_id} of this run is {job.state}; it goes on by itself. "
            f"Take it out of the queue first (python -m launcher cancel {folder}), or use another "
            "run folder (folder=...)"
        )
    refuse_stopped(record)


def refuse_stopped(record: RunRecord) -> None:
    """Refuse a run with a stop file, which would stop a new job at once.

    Raises:
        LaunchError: there is one.
    """
    if record.stop_requested:
        folder = shlex.quote(str(record.folder))
        raise LaunchError(
            f"{record.folder / STOP_FILE}: the stop file is there, so the job would stop at once; "
            f"take it back first (python -m launcher stop --undo {folder})"
        )


def train_script() -> Path:
    """Return the batch script.

    Raises:
        LaunchError: it does not lie beside the package.
    """
    script = SOURCE / "slurm" / "train.sbatch"
    if not script.is_file():
        raise LaunchError(
            f"{script}: the batch script is missing; install the project from its work tree "
            "(pip install --editable)"
        )
    return script


def describe(submission: Submission, job_id: str) -> str:
    """Return what a person wants to know of a job that was just queued."""
    cluster, folder = submission.cluster, shlex.quote(str(submission.folder))
    return "\n".join(
        [
            f"job {job_id}: {submission.plan.summary}",
            f"  on {cluster.nodes} nodes x {cluster.local_ranks} ranks by {cluster.launcher}",
            f"  log      {log_path(submission.folder, job_id)}",
            f"  follow   python -m launcher logs {folder} -f",
            f"  state    python -m launcher status {folder}",
            f"  stop     python -m launcher stop {folder}     (checkpoint, then leave)",
            f"  cancel   python -m launcher cancel {folder}",
        ]
    )


def record_submission(submission: Submission, job_id: str, life: int) -> None:
    """Write down a job that SLURM has taken, or warn: nothing takes the job back any more.

    Args:
        submission: the job.
        job_id: as SLURM prints it.
        life: number of the job's first life.
    """
    try:
        LaunchFolder(submission.folder).record(submission_record(submission, job_id), life)
    except StorageError as error:
        print(
            f"warning: job {job_id} is in the queue, but the run folder could not take its record "
            f"({error.__cause__ or error}). Until it starts, `status`, `cancel` and another "
            f"submission may not know of it; take it out of the queue with: scancel {job_id}",
            file=sys.stderr,
        )


def launch_files(submission: Submission) -> dict[str, bytes]:
    """Return what a submission leaves in the folder `launch` of the run, by name.

    Args:
        submission: the job.
    """
    launch = LaunchFolder(submission.folder)
    files = {
        launch.run_file.name: dump_config(submission.run).encode(),
        launch.cluster_file.name: dump_cluster(submission.cluster).encode(),
    }
    if submission.plan.text:
        files[PLAN_FILE] = f"{submission.plan.text}\n".encode()
    if diff := git_diff(SOURCE):
        files[DIFF_FILE] = diff
    return files


def submission_record(submission: Submission, job_id: str) -> dict[str, object]:
    """Return who submitted what, where and with which software, for `submission.json`.

    Args:
        submission: the job.
        job_id: as SLURM prints it.
    """
    return {
        "time": time.time(),
        "user": user_name(),
        "host": platform.node(),
        "cwd": str(submission.working_folder),
        "argv": _arguments(sys.argv),
        "sbatch": list(submission.command.argv),
        "task": submission.task,
        "git": git_state(SOURCE),
        "versions": library_versions(),
        "job_id": job_id,
        "plan": submission.plan.summary,
    }


def _arguments(argv: Sequence[str]) -> list[str]:
    """Return arguments as text that JSON can hold, whatever bytes they were."""
    return [argument.encode(errors="replace").decode() for argument in argv]


def _path_problems(paths: dict[str, Path]) -> list[str]:
    found = []
    for key, path in paths.items():
        if not str(path).isprintable():
            found.append(f"{key}: {str(path)!r} holds characters that cannot be printed")
        elif "\\" in str(path):
            found.append(
                f"{key}: {str(path)!r} holds a backslash, at which SLURM stops reading file names"
            )
    return found
