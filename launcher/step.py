"""One srun step: started, told of signals, waited for, and ended where it does not end by itself.

srun's word is not enough. It may wait for tasks on a node that no longer exists, and its exit code
is the highest of all tasks. So its end is what counts, and where that does not come although the
ranks of this node are gone or rank 0 has said how it ended, it is brought about.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from launcher.commands import Command
from launcher.inbox import SignalInbox
from launcher.slurm_control import SlurmControl

logger = logging.getLogger(__name__)

_OVER = "the ranks had ended, but srun did not"
_NEVER = "srun started no task on the first node within {:g} minutes (its own words stand above)"


@dataclass(frozen=True)
class Pace:
    """Seconds between things that a watch does.

    Attributes:
        look: between two looks at the clock and the outcome file.
        listing: between two looks at the tasks of this node.
        resend: between two warnings to the ranks: one that comes while Python starts is lost.
        margin: beyond srun's own waiting time, until a step that should be over is ended.
        kill: until tasks that were killed must be gone.
        start: from the start of srun until a task must have been seen on this node.
    """

    look: float = 2.0
    listing: float = 30.0
    resend: float = 15.0
    margin: float = 60.0
    kill: float = 20.0
    start: float = 900.0


@dataclass(frozen=True)
class StepRules:
    """How long a step may take for what.

    Attributes:
        grace_seconds: from a request to stop to the end.
        wait_seconds: from the end of the first rank to that of srun.
        forward_warning: whether the tasks can do something with SIGUSR1; else it ends the step.
        limit_seconds: for the whole step; None for no limit.
    """

    grace_seconds: float
    wait_seconds: float
    forward_warning: bool = True
    limit_seconds: float | None = None


@dataclass
class StepEnd:
    """How a step ended.

    Attributes:
        exit_code: of srun (negative: killed by that signal); no reliable message.
        warned: whether SIGUSR1 came to the batch script.
        terminated: whether SIGTERM came.
        interrupted: whether SIGINT came.
        killed: why the step was ended from here; empty where it ended by itself.
        abandoned: srun, where SLURM ends the whole job and it was not waited for.
    """

    exit_code: int | None = None
    warned: bool = False
    terminated: bool = False
    interrupted: bool = False
    killed: str = ""
    abandoned: subprocess.Popen[bytes] | None = None


class StepWatch:
    """Runs one step to its end."""

    def __init__(
        self,
        control: SlurmControl,
        inbox: SignalInbox,
        rules: StepRules,
        *,
        pace: Pace | None = None,
        on_signal: Callable[[signal.Signals], bool] = lambda number: False,
        has_outcome: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare to run a step.

        Args:
            control: SLURM.
            inbox: signals to the batch script.
            rules: how long the step may take for what.
            pace: how often to look.
            on_signal: told of every signal; True abandons the step because SLURM ends the job.
            has_outcome: whether rank 0 has said how it ended.
        """
        self._control, self._inbox, self._rules = control, inbox, rules
        self._pace = pace or Pace()
        self._on_signal, self._has_outcome = on_signal, has_outcome
        self._end = StepEnd()
        self._limits: dict[str, float] = {}
        self._had_tasks = self._tasks_gone = False
        self._start = 0.0
        self._next_listing = 0.0
        self._next_warning = 0.0

    def run(self, command: Command) -> StepEnd:
        """Start the step and return when it is over.

        Args:
            command: srun with its arguments, and the variables to set.
        """
        if self._is_forestalled():
            return self._end
        start = self._start = time.monotonic()
        if self._rules.limit_seconds is not None:
            self._limit(start + self._rules.limit_seconds, "the step took too long")
        self._next_listing = start + self._pace.listing
        try:
            srun = subprocess.Popen(
                list(command.argv),
                env={**os.environ, **command.environment},
                stdin=subprocess.DEVNULL,
                # Signals to the process group of the batch script would make srun kill the step.
                start_new_session=True,
            )
        except OSError as error:
            self._end.killed = f"{command.argv[0]} cannot be started ({error.strerror or error})"
            return self._end
        try:
            while srun.poll() is None and self._end.abandoned is None:
                self._attend(srun, self._inbox.wait(self._pace.look))
        except BaseException:
            self._kill(srun, "the supervisor failed")  # nobody would look after the ranks
            raise
        self._end.exit_code = srun.poll()
        return self._end

    def _is_forestalled(self) -> bool:
        """Whether a signal came before the start; tasks that start later would not hear of it."""
        for number in self._inbox.wait(0.0):
            end = self._end
            end.warned = end.warned or number == signal.SIGUSR1
            end.terminated = end.terminated or number == signal.SIGTERM
            end.interrupted = end.interrupted or number == signal.SIGINT
            end.killed = f"{number.name} came before the step was started"
            self._on_signal(number)
        return bool(self._end.killed)

    def _attend(self, srun: subprocess.Popen[bytes], arrived: list[signal.Signals]) -> None:
        """Do what is due: pass signals on, look for an end that does not come, kill."""
        for number in arrived:
            self._take(srun, number)
        now = time.monotonic()
        self._look_for_end(now)
        forward = self._end.warned and self._rules.forward_warning
        if forward and now >= self._next_warning and _OVER not in self._limits:
            self._next_warning = now + self._pace.resend
            self._pass_on(srun, "USR1")
        due = [why for why, at in self._limits.items() if now >= at]
        if due and srun.poll() is None:
            self._kill(srun, due[0])

    def _take(self, srun: subprocess.Popen[bytes], number: signal.Signals) -> None:
        grace = time.monotonic() + self._rules.grace_seconds
        end, waited = self._end, f"within {self._rules.grace_seconds:g} s (lives.grace_seconds)"
        if number == signal.SIGUSR1:
            end.warned = True
            if self._rules.forward_warning:
                self._limit(grace, f"the ranks did not stop {waited} after the warning")
            else:
                self._limit(time.monotonic(), "the warning came")
        elif number == signal.SIGTERM:
            end.terminated = True
            self._limit(grace, f"the ranks did not stop {waited} after SIGTERM")
        else:
            end.interrupted = True
            self._pass_on(srun, "INT")
            self._limit(grace, f"the ranks did not stop {waited} after Ctrl-C")
        if self._on_signal(number):
            end.abandoned, end.killed = srun, "the time was over before the ranks had stopped"

    def _pass_on(self, srun: subprocess.Popen[bytes], name: str) -> None:
        reply = self._control.signal_steps(name)
        if not reply.ok and srun.poll() is None:
            logger.warning("%s; srun passes the signal on instead", reply.problem)
            # It speaks to the nodes itself, without the controller. Its answer to SIGINT is a
            # question to the terminal, so that one is left to the controller.
            if name == "USR1":
                srun.send_signal(signal.SIGUSR1)

    def _look_for_end(self, now: float) -> None:
        """Note when ranks are seen to have ended, and set the time at which srun must have too."""
        if not self._is_over(now):
            self._limits.pop(_OVER, None)
        elif _OVER not in self._limits:
            self._limit(now + self._rules.wait_seconds + self._pace.margin, _OVER)

    def _is_over(self, now: float) -> bool:
        if self._has_outcome():
            return True
        if now >= self._next_listing:
            self._next_listing = now + self._pace.listing
            has_tasks = self._control.has_local_tasks()
            self._had_tasks = self._had_tasks or has_tasks is True
            self._tasks_gone = self._had_tasks and has_tasks is False
            never = _NEVER.format(self._pace.start / 60)
            if self._had_tasks or has_tasks is None:
                self._limits.pop(never, None)
            else:
                self._limit(self._start + self._pace.start, never)
        return self._tasks_gone

    def _limit(self, at: float, why: str) -> None:
        """Set a time at which the step is killed; one that was set for the same reason stays."""
        self._limits.setdefault(why, at)

    def _kill(self, srun: subprocess.Popen[bytes], why: str) -> None:
        self._end.killed = why
        logger.warning("%s: the step is killed", why)
        self._control.kill_steps(self._pace.kill)
        # srun gives a step up on SIGTERM; where it still waits for a node that is gone, it goes.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(subprocess.TimeoutExpired):
                srun.wait(1.0)
                return
            srun.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                srun.wait(self._pace.kill)
                return
