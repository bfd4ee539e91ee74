"""Submitting the points of a sweep: one job each, or one job array for each stage.

Points are submitted in order, so that the jobs that a point waits for have their ids. A submission
that fails in the middle leaves the jobs before it in the queue; the same command again goes on
with the rest.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from launcher.commands import Command
from launcher.launch_folder import LaunchFolder
from launcher.planned_point import PlannedPoint
from launcher.run_reader import read_run
from launcher.sbatch_call import UnclearAnswerError, rehearse_sbatch, run_sbatch
from launcher.slurm_queue import SlurmQueue
from launcher.submission import (
    Submission,
    has_slurm,
    launch_files,
    record_submission,
    refuse_active,
    submit,
)
from launcher.sweep_array import SWEEP_FOLDER, ArrayTask, array_command, write_index
from launcher.sweep_children import take_out
from mpotrain.errors import ConfigError, MpotrainError

MAX_ARRAY = 1000
"""Tasks of an array that SLURM takes unless a cluster allows more (MaxArraySize)."""


@dataclass
class SweepSubmitter:
    """Submits planned points.

    Attributes:
        folder: folder of the sweep, an absolute path.
        queue: of the cluster.
        dry_run: submit nothing; commands are shown instead.
        show: called with each point, its job id and what it waits for.
        show_command: called with each command of a dry run.
        job_ids: jobs by run folder, those that were in the queue before included.
        num_submitted: points that have been given a job.
    """

    folder: Path
    queue: SlurmQueue
    dry_run: bool
    show: Callable[[PlannedPoint, str, str], None]
    show_command: Callable[[Command], None]
    job_ids: dict[Path, str] = field(default_factory=dict)
    num_submitted: int = 0
    _is_rehearsed: bool = False

    def submit_each(self, planned: Sequence[PlannedPoint]) -> None:
        """Submit one job for each point that needs one.

        Args:
            planned: all points of the sweep.

        Raises:
            LaunchError: SLURM refuses a job.
            StorageError: a run folder cannot be written.
        """
        self._begin(planned)
        for one in planned:
            if one.action == "submit":
                self._submit_one(one)

    def submit_arrays(self, planned: Sequence[PlannedPoint], max_running: int | None) -> None:
        """Submit one array for each stage that has points which need a job.

        Points that wait for different runs get a job each: SLURM knows dependencies of whole
        arrays only, but for `aftercorr`, which cannot follow a run to a new job.

        Args:
            planned: all points of the sweep.
            max_running: tasks of an array that may run at the same time; None for any number.

        Raises:
            ConfigError: a stage has more points than an array can have.
            LaunchError: SLURM refuses a job.
            StorageError: a folder cannot be written.
        """
        wanted = [one for one in planned if one.action == "submit"]
        stages = [(name, list(group)) for name, group in groupby(wanted, lambda o: o.point.stage)]
        if problems := [
            f"--array: stage {name!r} has {len(group):,} runs to submit, but an array can have "
            f"{MAX_ARRAY:,}; split the sweep, or leave --array out"
            for name, group in stages
            if len(group) > MAX_ARRAY
        ]:
            raise ConfigError(problems)
        self._begin(planned)
        for name, group in stages:
            if len({one.point.parents for one in group}) == 1:
                self._submit_array(name, group, max_running)
            else:
                for one in group:
                    self._submit_one(one)

    def _submit_one(self, one: PlannedPoint) -> None:
        after = dependency_of(self._parents(one))
        submission = with_dependency(one.submission, after)
        if self.dry_run:
            job_id = f"JOB-OF-{one.point.name}"
            self._rehearse(submission.command, after)
        else:
            job_id = submit(submission, self.queue)
        self._note(one, job_id, after)

    def _submit_array(
        self, stage: str, group: Sequence[PlannedPoint], max_running: int | None
    ) -> None:
        after = dependency_of(self._parents(group[0]))
        index = self.folder / SWEEP_FOLDER / f"{stage}-{uuid.uuid4().hex[:12]}.json"
        command = array_command(
            group[0].submission,
            name=f"{self.folder.name}-{stage}",
            index=index,
            num_tasks=len(group),
            max_running=max_running,
            after=after,
        )
        if self.dry_run:
            self._rehearse(command, after)
            array_id = f"ARRAY-OF-{stage}"
        else:
            array_id = self._queue_array(command, index, group)
        for task, one in enumerate(group):
            self._note(one, f"{array_id}_{task}", after)

    def _rehearse(self, command: Command, after: str) -> None:
        """Show a command; SLURM is asked about the first one that waits for no job of this show.

        The others differ in their names and in what they wait for.
        """
        self.show_command(command)
        if not self._is_rehearsed and "-OF-" not in after and has_slurm():
            rehearse_sbatch(command)
            self._is_rehearsed = True

    def _note(self, one: PlannedPoint, job_id: str, after: str) -> None:
        self.job_ids[one.point.folder] = job_id
        self.num_submitted += 1
        self.show(one, job_id, after)

    def _queue_array(self, command: Command, index: Path, group: Sequence[PlannedPoint]) -> str:
        """Write all run folders and the index, submit, and record the jobs."""
        submissions = [replace(one.submission, command=command) for one in group]
        with ExitStack() as stack:
            launches = [LaunchFolder(submission.folder) for submission in submissions]
            for launch in launches:
                stack.enter_context(launch.claimed())
            try:
                for launch, submission in zip(launches, submissions, strict=True):
                    refuse_active(read_run(submission.folder), self.queue)
                    launch.write(launch_files(submission))
                write_index(index, [ArrayTask(s.folder, s.task) for s in submissions])
                array_id = run_sbatch(command)
            except MpotrainError as error:
                if not isinstance(error, UnclearAnswerError):
                    for launch in launches:
                        launch.discard()
                    index.unlink(missing_ok=True)
                raise
            for task, submission in enumerate(submissions):
                num_starts = read_run(submission.folder).num_starts
                record_submission(submission, f"{array_id}_{task}", num_starts)
        return array_id

    def _begin(self, planned: Sequence[PlannedPoint]) -> None:
        """Take out what is to be submitted anew, and note the jobs that stay."""
        if not self.dry_run:
            take_out(planned, self.queue)
        for one in planned:
            if one.action == "queued" and one.job_id is not None:
                self.job_ids[one.point.folder] = one.job_id

    def _parents(self, one: PlannedPoint) -> list[str]:
        """Return the jobs that a point waits for; parents that are done have none."""
        found = (self.job_ids.get(parent) for parent in one.point.parents)
        return [job_id for job_id in found if job_id is not None]


def dependency_of(job_ids: Sequence[str]) -> str:
    """Return the dependency on the good end of jobs, in the words of sbatch; empty for none."""
    return f"afterok:{':'.join(dict.fromkeys(job_ids))}" if job_ids else ""


def with_dependency(submission: Submission, after: str) -> Submission:
    """Return a job that waits for others.

    Args:
        submission: the job.
        after: dependency in the words of sbatch; empty for none.
    """
    if not after:
        return submission
    command = submission.command
    # A dependency that can no longer be met would stay in the queue for ever.
    options = (f"--dependency={after}", "--kill-on-invalid-dep=yes")
    argv = (command.argv[0], *options, *command.argv[1:])
    return replace(submission, command=replace(command, argv=argv))
