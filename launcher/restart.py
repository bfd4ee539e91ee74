"""Another life for a run: the same job once more, or a new job in its place."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from launcher.cluster import ClusterConfig
from launcher.commands import Command, Task
from launcher.job_state import JobState
from launcher.last_words import LastWords
from launcher.life_log import newest_step
from launcher.lives import Way
from launcher.slurm_commands import sbatch_command, sbatch_options
from launcher.slurm_control import OVERTAKEN, SlurmControl
from launcher.slurm_names import LOGS, job_name, log_pattern
from launcher.submission import train_script
from mpotrain.errors import MpotrainError

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 7200.0
"""How long a controller may be away before the run is given up: an upgrade takes an hour. The time
limit of the job ends the wait too."""
KILL_SECONDS = 20.0
"""How long to wait for the last tasks before a new job may start beside them."""


class Recorder(Protocol):
    """Writes a line into `lives.jsonl`, or says in the log why it cannot."""

    def __call__(self, event: Any, detail: str, **more: Any) -> None:
        """Write one event."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What a new job in this one's place needs.

    Attributes:
        cluster: the cluster.
        name: of the run.
        task: sub-command of mpotrain.
        run_file: run file, an absolute path.
        cluster_file: cluster file, likewise; None for a job that was submitted by hand, of whose
            options too little is known.
        overrides: `dotted.key=value` lines.
        run_folder: the run folder, an absolute path.
        working_folder: where the job runs.
    """

    cluster: ClusterConfig
    name: str
    task: Task
    run_file: Path
    cluster_file: Path | None
    overrides: tuple[str, ...]
    run_folder: Path
    working_folder: Path

    def command(
        self, continues: str, exclude: Sequence[str], after: str | None = None
    ) -> Command | None:
        """Return the command that submits the job; None where that cannot be.

        Args:
            continues: the job whose place it takes.
            exclude: nodes not to use.
            after: dependency; None starts as soon as there is room.

        Raises:
            LaunchError: the batch script is missing.
        """
        if self.cluster_file is None:
            return None
        options = sbatch_options(
            self.cluster,
            name=job_name(self.name),
            log=log_pattern(self.run_folder),
            folder=str(self.working_folder),
            after=after,
            exclude=exclude,
        )
        command = sbatch_command(
            self.cluster,
            str(train_script()),
            str(self.run_file),
            str(self.cluster_file),
            options=options,
            task=self.task,
        )
        return replace(command, argv=(*command.argv, f"--continues={continues}", *self.overrides))

    def by_hand(self) -> str:
        """Return the shell line with which a person starts the run again."""
        script = "sbatch [its options] slurm/train.sbatch"
        words = [] if self.cluster_file is None else ["--cluster", str(self.cluster_file)]
        words += ["--task", self.task] if self.task != "train" else []
        start = script if self.cluster_file is None else "python -m launcher slurm"
        rest = shlex.join([str(self.run_file), *words, *self.overrides])
        return f"cd {shlex.quote(str(self.working_folder))} && {start} {rest}"


LEAVING = frozenset({"PENDING", "REQUEUED", "COMPLETING"})
"""States of a job that goes back into the queue; COMPLETING says nothing where the time was up."""


class Restart:
    """Starts the next life; the last thing that a batch script does.

    Attributes:
        is_replaced: whether a new job goes on with the run, or a later life of this one does.
        successor: the new job; None where there is none.
    """

    def __init__(
        self,
        control: SlurmControl,
        record: Recorder,
        new_job: NewJob,
        words: LastWords,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        kill_seconds: float = KILL_SECONDS,
    ) -> None:
        """Prepare.

        Args:
            control: SLURM.
            record: how to write into `lives.jsonl`.
            new_job: what a new job needs.
            words: for the log.
            patience_seconds: how long a controller may be away.
            kill_seconds: how long to wait for the last tasks of this job.
        """
        self._control, self._record, self._new_job = control, record, new_job
        self._words = words
        self._patience_seconds, self._kill_seconds = patience_seconds, kill_seconds
        self._restart_count, self._is_timeout = 0, False
        self.is_replaced = self._gave_way = False
        self.successor: str | None = None

    def perform(
        self,
        ways: Sequence[Way],
        reason: str,
        *,
        dead: Sequence[str],
        bad: Sequence[str],
        state: JobState,
        restart_count: int,
    ) -> str:
        """Start the next life in the first way that works.

        SIGTERM must be ignored by now: `scontrol requeue` ends the very script that calls it.

        Args:
            ways: the ways to try, in order.
            reason: why, in words.
            dead: nodes that do not answer.
            bad: nodes that answer, but are not fit.
            state: what SLURM has said last of the job.
            restart_count: how often SLURM had started the job before this life.

        Returns:
            Why there is none, in words; empty where there is one.
        """
        self._restart_count, self._is_timeout = restart_count, state.is_timeout
        problems: list[str] = []
        for way in ways:
            # Where the time is up each second counts, and this is the life that SLURM ends.
            if not self._is_timeout:
                own = self._control.own_life(restart_count, self._patience_seconds)
                if own.problem == OVERTAKEN:
                    return self._leave()
                if own.may_pass:
                    return "; ".join([*problems, f"SLURM does not answer: {own.problem}"])
            if way == "requeue":
                problem = self._requeue(reason, bad)
            else:
                problem = self._resubmit(reason, dead, bad)
            if not problem:
                return ""
            logger.warning("cannot %s: %s", way, problem)
            problems.append(f"cannot {way}: {problem}")
        return "; ".join(problems)

    def _leave(self) -> str:
        """Leave the run to the life that SLURM has started since."""
        logger.info("%s", self._words.left_to(self._control.target))
        self.is_replaced = True
        return ""

    def _requeue(self, reason: str, bad: Sequence[str]) -> str:
        # SLURM may end this process at any instant from now on: the record comes first.
        exclude = list(bad) if bad and self._leaves_enough(bad) else []
        self._record("requeued", reason, exclude=exclude)
        logger.info("%s", self._words.requeued(reason, newest_step(self._new_job.run_folder)))
        if self._gave_way:
            # SLURM may not have heard that the job may come back after all.
            self._control.allow_requeue(True)
        reply = self._control.requeue(self._patience_seconds, self._restart_count)
        if reply.problem == OVERTAKEN:
            return self._leave()
        if not reply.ok:
            # An answer may be late where the deed is done.
            found = self._control.state(attempts=1)
            self._is_timeout = self._is_timeout or found.is_timeout  # it may have come meanwhile
            says_nothing = found.state == "COMPLETING" and self._is_timeout and not reply.may_pass
            return "" if found.state in LEAVING and not says_nothing else reply.problem
        if exclude:
            # SLURM takes the nodes to avoid from a waiting job alone, that is from now on. Nodes
            # that are dead need no naming: it does not start the job before it knows of them.
            own = self._new_job.cluster.exclude
            excluded = self._control.exclude([*([own] if own else []), *exclude])
            if not excluded.ok:
                logger.warning("%s are not excluded: %s", ", ".join(exclude), excluded.problem)
        return ""

    def _leaves_enough(self, exclude: Sequence[str]) -> bool:
        """Whether SLURM could still place the job; one that it cannot place would wait for ever."""
        command = self._command(exclude)
        if isinstance(command, str):
            return True
        problem = self._control.refusal(command.argv, command.environment)
        if problem:
            logger.warning("nothing is excluded, or no nodes are left: %s", problem)
        return not problem

    def _resubmit(self, reason: str, dead: Sequence[str], bad: Sequence[str]) -> str:
        state = self._control.state()
        if state.is_taken_away:
            return f"SLURM is ending this job (state {state.state})"
        self._is_timeout = state.is_timeout if state.state else self._is_timeout
        try:
            # A job that was submitted by hand has its log elsewhere; SLURM makes no folder for it.
            (self._new_job.run_folder / LOGS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"{self._new_job.run_folder / LOGS} cannot be made ({error.strerror or error})"
        exclude, command = self._without(dead, bad)
        if isinstance(command, str):
            return command
        # Ranks of a job whose time is up may still write a checkpoint until SLURM kills them, and
        # SLURM does not bring it back: the new job waits for its end.
        if not self._is_timeout:
            self._give_way(dead)
        state = self._control.state(attempts=1)
        if state.is_taken_away:
            self._control.allow_requeue(True)
            return f"SLURM is ending this job (state {state.state})"
        job_id, problem = self._control.submit(
            command.argv, command.environment, self._patience_seconds, self._restart_count
        )
        if problem == OVERTAKEN:
            return self._leave()
        if job_id is None:
            if not self._is_timeout:
                self._control.allow_requeue(True)
            return problem
        self._record("resubmitted", f"as job {job_id}: {reason}", next_job=job_id, exclude=exclude)
        self.is_replaced, self.successor = True, job_id
        step = newest_step(self._new_job.run_folder)
        logger.info("%s", self._words.resubmitted(job_id, exclude, reason, step))
        self._hand_over(job_id)
        return ""

    def _without(
        self, dead: Sequence[str], bad: Sequence[str]
    ) -> tuple[tuple[str, ...], Command | str]:
        """Return the nodes to exclude, and the command, or why SLURM could not place the job."""
        problem = ""
        for exclude in dict.fromkeys([tuple(dict.fromkeys([*dead, *bad])), tuple(dead)]):
            command = self._command(exclude)
            if isinstance(command, str):
                return exclude, command
            problem = self._control.refusal(command.argv, command.environment)
            if not problem:
                return exclude, command
        return (), problem

    def _give_way(self, dead: Sequence[str]) -> None:
        """Make sure that nothing of this job goes on beside the new one."""
        self._gave_way = True
        # The tasks of a dead node stay in the books until SLURM gives it up.
        self._control.kill_steps(self._kill_seconds / 4 if dead else self._kill_seconds)
        # From here on the loss of a node must not bring this job back.
        kept = self._control.allow_requeue(False)
        if not kept.ok:
            logger.warning("SLURM may still start this job again: %s", kept.problem)

    def _hand_over(self, job_id: str) -> None:
        """Let jobs that wait for this one wait for the new one, and name those that do not."""
        found = self._control.hand_over_dependents(job_id)
        if found.moved:
            logger.info("jobs that wait for it now: %s", ", ".join(found.moved))
        if found.problem:
            logger.warning(
                "jobs that wait for this one may never start, and which they are is not known (%s);"
                " see: squeue --me --states=PENDING --format='%%i %%E'",
                found.problem,
            )
        for waiting, (command, problem) in found.left.items():
            logger.warning(
                "job %s still waits for this one and may never start (%s); mend it with: %s",
                waiting,
                problem,
                command,
            )

    def _command(self, exclude: Sequence[str]) -> Command | str:
        try:
            after = f"afterany:{self._control.target}" if self._is_timeout else None
            command = self._new_job.command(self._control.target, exclude, after)
        except MpotrainError as error:
            return str(error)
        return command or "the job was submitted without a cluster file (--cluster)"
