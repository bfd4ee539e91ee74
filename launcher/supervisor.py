"""One life of a run, from its claim to the decision what comes after it.

The supervisor is the batch script of the job. It starts the ranks, tells them when the time is
nearly over, finds out how they ended, and brings the run back as long as that can help. All it must
remember stands in the run folder, so a job that is killed at any instant loses nothing.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace

from launcher.batch_run import BatchRun
from launcher.inbox import SignalInbox
from launcher.job import JobFacts, master_port
from launcher.job_state import RUNNING
from launcher.journal import PATIENT_ATTEMPTS, Journal
from launcher.last_words import LastWords
from launcher.life_history import History, bad_nodes_of, chain_of, history_of
from launcher.life_log import Record, RunOutcome, newest_step, read_outcome
from launcher.lives import FINAL, Decision, LifeEnd, avoidable, decide
from launcher.node_check import (
    NodeVerdict,
    check_command,
    check_rules,
    read_verdict,
    report_folder,
)
from launcher.restart import Restart
from launcher.rival import await_lock, rival_of
from launcher.run_folder import CHECKPOINTS
from launcher.slurm_commands import step_command
from launcher.slurm_control import OVERTAKEN, SlurmControl
from launcher.step import Pace, StepEnd, StepRules, StepWatch
from launcher.succession import is_successor, successor_of
from launcher.writer_lock import is_written
from mpotrain.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED

logger = logging.getLogger(__name__)


class Supervisor:
    """Runs one life."""

    def __init__(
        self,
        run: BatchRun,
        control: SlurmControl,
        inbox: SignalInbox,
        *,
        pace: Pace | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare a life; nothing is read or written yet.

        Args:
            run: what it is about.
            control: SLURM.
            inbox: signals to this process.
            pace: how often to look for what.
            sleep: how to wait.
        """
        self._run, self._control, self._inbox, self._sleep = run, control, inbox, sleep
        self._pace = pace or Pace()
        self._folder, self._cluster = run.job.run_folder, run.job.cluster
        self._journal = Journal(self._folder, run.allocation, sleep)
        self._words = LastWords(run.allocation.job_id, self._folder, run.job.by_hand())
        self._restart = Restart(
            control, self._journal.record, run.job, self._words, kill_seconds=self._pace.kill
        )
        self._bad_before: tuple[str, ...] = ()
        self._state = RUNNING
        self._abandoned: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run the life and bring about the next one, if there is to be one.

        Returns:
            The exit code of the batch script.

        Raises:
            StorageError: what earlier lives have written cannot be read; nothing was started.
        """
        allocation, journal = self._run.allocation, self._journal
        before, sleep = self._run.continues, self._sleep
        if before and not is_successor(journal.records, before, allocation.number, sleep=sleep):
            logger.info("%s", self._words.left_to(before))
            return EXIT_STOPPED
        if self._is_left(journal.records()):
            return EXIT_STOPPED
        locked = await_lock(
            self._folder / CHECKPOINTS,
            self._run.lock_seconds,
            sleep=sleep,
            is_called=lambda: self._inbox.has_letters or journal.stop_file_is_there(),
        )
        records = journal.records()  # another job may have waited for the same lock, and begun
        if self._is_left(records) or self._is_overtaken():
            return EXIT_STOPPED
        step = newest_step(self._folder)
        history = self._history(records, step)
        journal.life = history.life
        code = self._give_up(locked) if locked else self._without_start(step, history)
        if code is not None:
            return code
        self._begin(step)
        end = self._survived(step, history)
        # Of a job that SLURM ends no later life has begun, and there may be no time to ask.
        journal.keeps_stop_file = False
        if not (end.job.is_taken_away or end.job.is_timeout) and self._is_overtaken():
            return EXIT_STOPPED
        decision = decide(end, self._cluster.lives)
        journal.record(
            "ended",
            decision.reason,
            counts=end.counts,
            outcome=end.outcome,
            reason=end.reason,
            decision=decision.kind,
        )
        return self._act(decision, end)

    def _is_left(self, records: list[Record]) -> bool:
        """Whether another job goes on with the run."""
        job_id = self._run.allocation.job_id
        other = successor_of(records, job_id) or rival_of(records, job_id, self._run.continues)
        if other is not None:
            logger.info("%s", self._words.left_to(other))
        return other is not None

    def _is_overtaken(self) -> bool:
        """Whether SLURM has started the job again since: the later life has the last word."""
        own = self._control.own_life(self._run.allocation.restart_count)
        if own.problem == OVERTAKEN:
            logger.info("%s", self._words.left_to(self._run.allocation.job_id))
            return True
        # Without an answer a life says how it ended: its lines name it, and take nothing away. But
        # it deletes no stop file, which a later life may still have to obey: one that is left over
        # costs a person a command, one that is missed lets the run train on against their will.
        self._journal.keeps_stop_file = own.may_pass
        return False

    def _history(self, records: list[Record], step: int | None) -> History:
        allocation, continues = self._run.allocation, self._run.continues
        self._bad_before = bad_nodes_of(chain_of(records, allocation.job_id, continues))
        return history_of(
            records,
            allocation.job_id,
            continues=continues,
            restart_count=allocation.restart_count,
            step=step,
            settings=self._run.settings,
        )

    def _without_start(self, step: int | None, history: History) -> int | None:
        """Return the exit code where no rank must be started, None where the run is to go on."""
        outcome = read_outcome(self._folder)
        is_final = outcome is not None and outcome.outcome in FINAL
        if is_final and step is not None and step >= self._run.last_step:
            text = f"nothing is left to do: the run has reached step {step}"
            logger.info("%s", text)
            self._journal.record("done", text)
            return EXIT_DONE
        if self._journal.stop_file_is_there():
            why = "the stop file was there, so nothing was started"
            # Where somebody writes it may be meant for the writer.
            if not is_written(self._folder / CHECKPOINTS) and self._journal.obey_stop_file():
                why += ", and it is deleted now"
            logger.info("%s", self._words.stopped(why, step))
            self._journal.record("stopped", why)
            return EXIT_STOPPED
        policy = self._cluster.lives
        if history.fruitless >= policy.lives_without_progress:
            return self._give_up(
                f"{history.fruitless} lives one after another have ended without progress "
                f"(lives.lives_without_progress={policy.lives_without_progress})"
            )
        if history.num_lives > policy.max_lives:
            return self._give_up(f"the run has had lives.max_lives={policy.max_lives} lives")
        return None

    def _begin(self, step: int | None) -> None:
        """Claim the life: from here on it counts."""
        begin = "from the start" if step is None else f"from step {step}"
        more = {"continues": self._run.continues} if self._run.continues else {}
        self._journal.begin(step, begin, settings=self._run.settings, **more)
        life, shown = self._journal.life, ", ".join(self._run.allocation.nodes)
        logger.info("life %d begins %s on %s", life, begin, shown)

    def _survived(self, step: int | None, history: History) -> LifeEnd:
        """Live; where the supervisor itself fails, that is an end as well, and counts as one."""
        try:
            return self._live(step, history)
        except Exception as error:
            logger.exception("the supervisor failed; the run goes on in another life")
            return replace(
                self._unlived(step, history),
                end_step=newest_step(self._folder),
                stop_file=self._journal.stop_file_is_there(),
                killed=f"the supervisor failed: {type(error).__name__}: {error}",
            )

    def _unlived(self, step: int | None, history: History) -> LifeEnd:
        """Return what is known of the end before there is one."""
        return LifeEnd(
            start_step=step,
            end_step=step,
            lives=history.num_lives,
            fruitless_before=history.fruitless,
            has_trained=history.has_trained,
            nodes=self._run.allocation.nodes,
        )

    def _live(self, step: int | None, history: History) -> LifeEnd:
        """Check the nodes, run the ranks, and gather what is known of their end."""
        nodes = self._run.allocation.nodes
        job = JobFacts(
            job_id=self._run.allocation.job_id,
            life=self._journal.life,
            nodes=nodes,
            master_address=self._control.node_address(nodes[0]),
            master_port=master_port(self._run.allocation.job_id, self._journal.life),
            folder=str(self._run.job.working_folder),
        )
        end = self._unlived(step, history)
        if self._cluster.preflight.enabled:
            checked, verdict = self._check_nodes(job)
            if not verdict.ok:
                end = replace(end, preflight=verdict.text, bad_nodes=verdict.exclude)
                return self._witnessed(end, checked)
        return self._witnessed(end, self._run_ranks(job))

    def _check_nodes(self, job: JobFacts) -> tuple[StepEnd, NodeVerdict]:
        watch = StepWatch(
            self._control,
            self._inbox,
            check_rules(self._cluster),
            pace=self._pace,
            on_signal=self._heard,
        )
        checked = watch.run(check_command(self._cluster, self._folder, job))
        if checked.warned or checked.terminated or checked.interrupted:
            return checked, NodeVerdict(False, problems=("a signal came before it had ended",))
        verdict = read_verdict(report_folder(self._folder, job), job.nodes)
        logger.info("%s", verdict.text)
        self._journal.record(
            "preflight",
            verdict.text,
            ok=verdict.ok,
            bad_nodes=dict(verdict.bad_nodes),
            exclude=list(avoidable(verdict.exclude, job.nodes)),
        )
        return checked, verdict

    def _run_ranks(self, job: JobFacts) -> StepEnd:
        lives = self._cluster.lives
        restarts_inside = self._cluster.launcher == "torchrun" and lives.worker_restarts > 0
        watch = StepWatch(
            self._control,
            self._inbox,
            StepRules(grace_seconds=lives.seconds_to_save, wait_seconds=lives.srun_wait_seconds),
            pace=self._pace,
            on_signal=self._heard,
            # A failure that torchrun mends inside the life leaves an outcome too.
            has_outcome=lambda: not restarts_inside and self._journal.outcome() is not None,
        )
        task, run_file = self._run.job.task, str(self._run.job.run_file)
        return watch.run(step_command(self._cluster, task, run_file, self._run.job.overrides, job))

    def _heard(self, number: signal.Signals) -> bool:
        """Record a signal; whether SLURM is ending a job whose time is over."""
        if number == signal.SIGTERM:
            self._state = self._control.state(attempts=1)
        meaning = {
            signal.SIGUSR1: "the time is nearly over: the ranks shall write a checkpoint",
            signal.SIGTERM: f"SLURM ends the job (state {self._state.state or 'unknown'})",
            signal.SIGINT: "Ctrl-C",
        }[number]
        logger.info("%s: %s", number.name, meaning)
        self._journal.record("warned", meaning, signal=number.name)
        return number == signal.SIGTERM and self._state.is_timeout

    def _witnessed(self, end: LifeEnd, step: StepEnd) -> LifeEnd:
        """Add everything that can be found out after the last step of a life."""
        self._abandoned = step.abandoned
        logger.info("the step has ended%s", f" ({step.killed})" if step.killed else "")
        outcome = (None if end.preflight else self._journal.outcome()) or RunOutcome("")
        # Where SLURM has said already that it ends the job there may be no time to ask again.
        state = self._control.state() if step.abandoned is None else self._state
        end = replace(
            end,
            end_step=newest_step(self._folder),
            outcome=outcome.outcome or None,
            reason=outcome.reason,
            detail=outcome.detail,
            retry=outcome.retry,
            exit_code=outcome.exit_code,
            last_step=outcome.step,
            job=state,
            stop_file=self._journal.stop_file_is_there(),
            warned=step.warned,
            terminated=step.terminated,
            interrupted=step.interrupted,
            killed=step.killed,
        )
        if end.is_planned or end.outcome in FINAL or end.job.is_taken_away or end.job.is_timeout:
            return end
        if self._control.is_preempted():
            return replace(end, preempted=True)
        if end.warned:
            return end  # The time that is left belongs to the requeue.
        dead = self._control.dead_nodes(end.nodes)
        if set(dead) == set(end.nodes):
            # This process runs on one of them: it is rather the question that failed.
            dead = ()
        return replace(end, dead_nodes=dead)

    def _act(self, decision: Decision, end: LifeEnd) -> int:
        """Do what was decided; return the exit code."""
        reason, words = decision.reason, self._words
        if decision.kind == "give_up":
            return self._give_up(reason)
        if decision.kind == "finish":
            logger.info("%s", words.done(reason, end.end_step))
            self._journal.record("done", reason)
            return EXIT_DONE
        if decision.kind == "stop":
            # A job that SLURM brings back by itself must still find it.
            if end.stop_file and not end.job.is_taken_away:
                self._journal.obey_stop_file()
            is_taken = end.job.is_taken_away and not end.is_wanted
            said = words.taken(end.job, end.end_step) if is_taken else None
            logger.info("%s", said or words.stopped(reason, end.end_step))
            # Jobs that wait for the end of the run (afterok) shall not begin behind half of it.
            return EXIT_STOPPED
        return self._go_on(decision, end)

    def _go_on(self, decision: Decision, end: LifeEnd) -> int:
        """Ask for another life, as the last thing of this one; return the exit code."""
        if (now := self._control.state(attempts=1)).is_taken_away:
            logger.info("%s", self._words.taken(now, end.end_step))
            return EXIT_STOPPED
        self._inbox.ignore_ends()
        if (unwritten := self._unwritten(end)) is not None:
            return self._give_up(unwritten)
        bad = [node for node in decision.exclude if node not in end.dead_nodes]
        problem = self._restart.perform(
            decision.ways,
            decision.reason,
            dead=[node for node in decision.exclude if node in end.dead_nodes],
            bad=list(dict.fromkeys([*self._bad_before, *bad])),
            state=now if now.state else end.job,
            restart_count=self._run.allocation.restart_count,
        )
        if problem:
            return self._give_up(f"no other life could be started: {problem}")
        if self._restart.successor is not None:
            # It waits for the line that names it, and no other one will follow in this life.
            self._journal.catch_up()
        if self._abandoned is not None:
            # Until SLURM kills them (KillWait) ranks may still write a checkpoint, which the end of
            # the batch script would cut short.
            self._abandoned.wait()
        # Jobs that wait for this one and were not handed over shall not begin behind half a run.
        return EXIT_STOPPED if self._restart.is_replaced else EXIT_DONE

    def _unwritten(self, end: LifeEnd) -> str | None:
        """Say why no other life may follow one that is not on record; None where it may.

        Nobody would ever count it, and a run that always fails would start for ever.
        """
        must_count = end.counts and not end.progressed
        has_time = not (end.warned or end.terminated)
        is_written = self._journal.catch_up(PATIENT_ATTEMPTS if must_count and has_time else 1)
        if is_written or not must_count:
            return None
        return (
            f"the life failed without progress, and {self._journal.log.path} cannot be written, so "
            f"nobody would count it ({end.text})"
        )

    def _give_up(self, reason: str) -> int:
        logger.error("%s", self._words.given_up(reason, newest_step(self._folder)))
        self._journal.record("gave_up", reason)
        return EXIT_CRASH
