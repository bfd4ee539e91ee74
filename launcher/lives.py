"""How a run goes on after the end of a life: a pure decision (nothing is read, asked or started).

A life is one start of the run by one job. What is known at its end comes from many witnesses, all
of them fallible: the outcome file of rank 0, checkpoints, SLURM's state of the job, signals that
came, nodes that answer. Exit codes do not count: srun returns the highest of all ranks, and
launchers invent their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.job_state import RUNNING, JobState
from launcher.policies import LivesConfig
from mpotrain.errors import EXIT_BAD_INPUT

Kind = Literal["finish", "stop", "restart", "give_up"]
"""finish: nothing is left to do. stop: a person, or SLURM itself, has the last word. restart: the
run goes on in another life. give_up: another life would not help."""

Way = Literal["requeue", "resubmit"]
"""How another life comes about: the same job once more, or a new one."""

FINAL = frozenset({"done", "held"})
"""Outcomes of a run that has come to its configured end."""
BY_PERSON = frozenset({"STOP_FILE", "SIGINT"})
"""Reasons of a stop that only a person can have given."""


@dataclass(frozen=True, kw_only=True)
class LifeEnd:
    """What is known when a life has ended.

    Attributes:
        start_step: newest complete checkpoint when the life began, None for none.
        end_step: newest complete checkpoint now.
        lives: lives of the run up to and with this one.
        fruitless_before: failed lives without progress right before this one.
        nodes: nodes of the job.
        outcome: word of the outcome file; None where rank 0 wrote none in this life.
        reason: why ranks stopped, as the outcome file says.
        detail: the outcome file in words.
        retry: whether the ranks think that another start may help.
        exit_code: of rank 0, as the outcome file says.
        last_step: steps done when the ranks ended, as the outcome file says.
        has_trained: whether an earlier life with the same settings has made progress.
        job: SLURM's view of the job.
        stop_file: whether the stop file lies in the run folder.
        warned: whether SLURM's warning before the time limit came.
        terminated: whether SIGTERM came to the batch script: SLURM ends the job.
        interrupted: whether Ctrl-C came.
        preempted: whether the job has to make room for another one.
        killed: why the supervisor itself ended the step; empty where it did not.
        dead_nodes: nodes that do not answer.
        bad_nodes: nodes that failed the pre-flight.
        preflight: what was wrong with the pre-flight; empty where the ranks were started.
    """

    start_step: int | None
    end_step: int | None
    lives: int
    fruitless_before: int
    nodes: tuple[str, ...]
    outcome: str | None = None
    reason: str | None = None
    detail: str = ""
    retry: bool = True
    exit_code: int | None = None
    last_step: int | None = None
    has_trained: bool = False
    job: JobState = RUNNING
    stop_file: bool = False
    warned: bool = False
    terminated: bool = False
    interrupted: bool = False
    preempted: bool = False
    killed: str = ""
    dead_nodes: tuple[str, ...] = ()
    bad_nodes: tuple[str, ...] = ()
    preflight: str = ""

    @property
    def progressed(self) -> bool:
        """Whether the life has left a newer checkpoint."""
        return is_newer(self.end_step, self.start_step)

    @property
    def is_hopeless(self) -> bool:
        """Whether another start would meet the same error."""
        return self.outcome == "failed" and not self.retry and not self.may_pass

    @property
    def may_pass(self) -> bool:
        """Whether the ranks refused what they can work with, as an earlier start or step shows.

        What lies on a missing mount or on a file system that fails for a while looks like bad
        input, and so does the data of a run that was never right. Training tells them apart.
        """
        trained = self.last_step is not None and self.last_step > (self.start_step or 0)
        is_refused = self.outcome == "failed" and self.exit_code == EXIT_BAD_INPUT
        return is_refused and (trained or self.progressed or self.has_trained)

    @property
    def is_planned(self) -> bool:
        """Whether the ranks stopped in good order because they were asked to."""
        return self.outcome == "resume" and self.reason not in (
            "LOST_RANK",
            "HUNG",
            "LAUNCHER_DIED",
        )

    @property
    def is_wanted(self) -> bool:
        """Whether a person wanted the run to stop."""
        asked = self.outcome == "resume" and self.reason in BY_PERSON
        return asked or self.stop_file or self.interrupted

    @property
    def counts(self) -> bool:
        """Whether the life counts as a failed one where it has made no progress."""
        if self.outcome in FINAL or self.is_wanted or self.preempted or self.job.is_taken_away:
            return False
        if self.outcome == "resume" and self.reason == "SIGTERM":
            return False
        return self.warned or self.job.is_timeout or not self.terminated

    @property
    def fruitless(self) -> int:
        """Failed lives without progress one after another, with this one."""
        return 0 if self.progressed else self.fruitless_before + int(self.counts)

    @property
    def text(self) -> str:
        """What happened, in words."""
        if self.preflight:
            return self.preflight
        if self.outcome is not None:
            reason = f" ({self.reason})" if self.reason else ""
            said = f"{self.outcome}{reason}{f': {self.detail}' if self.detail else ''}"
        else:
            said = "the ranks ended without a word (killed, or their node was lost)"
        if self.may_pass:
            said += (
                "; with these settings the run has trained before, so this may be a missing mount "
                "or a file system that failed for a while"
            )
        if self.preempted:
            said = f"the job had to make room for another one; {said}"
        dead = f"; no answer from {', '.join(self.dead_nodes)}" if self.dead_nodes else ""
        return f"{self.killed}; {said}{dead}" if self.killed else f"{said}{dead}"


@dataclass(frozen=True)
class Decision:
    """What is to be done.

    Attributes:
        kind: see `Kind`.
        reason: in words, for the log and for `lives.jsonl`.
        exclude: nodes that the next life must not use.
        ways: how to start the next life, the best first; empty unless the run is restarted.
    """

    kind: Kind
    reason: str
    exclude: tuple[str, ...] = ()
    ways: tuple[Way, ...] = ()


def is_newer(step: int | None, than: int | None) -> bool:
    """Whether the checkpoint of a step is newer than another; None stands for no checkpoint."""
    return step is not None and (than is None or step > than)


def decide(end: LifeEnd, policy: LivesConfig) -> Decision:
    """Decide how the run goes on.

    Args:
        end: what is known at the end of the life.
        policy: the cluster file's section `lives`.
    """
    if end.outcome in FINAL:
        return Decision("finish", end.text)
    if end.is_wanted:
        why = "the stop file is there; " if end.stop_file else ""
        return Decision("stop", f"stopped on request: {why}{end.text}")
    if end.job.is_taken_away:
        return Decision("stop", f"SLURM ends this job (state {end.job.state}): left to SLURM")
    hopeless = hopeless_reason(end, policy)
    if hopeless is not None:
        return Decision("give_up", hopeless)
    if not policy.requeue:
        kind: Kind = "stop" if end.is_planned else "give_up"
        return Decision(kind, f"{end.text}; lives.requeue is false, so nothing follows")
    exclude = _excluded(end)
    return Decision("restart", end.text, exclude, _ways(end, policy))


def hopeless_reason(end: LifeEnd, policy: LivesConfig) -> str | None:
    """Say why another life would not help; None where it may.

    Args:
        end: what is known at the end of the life.
        policy: the cluster file's section `lives`.
    """
    if end.is_hopeless:
        return f"another start would end the same way; {end.text}"
    if end.fruitless >= policy.lives_without_progress:
        at = (
            "no checkpoint at all" if end.end_step is None else f"nothing newer than {end.end_step}"
        )
        return (
            f"{end.fruitless} failed lives one after another without progress ({at}; "
            f"lives.lives_without_progress={policy.lives_without_progress}); the last: {end.text}"
        )
    if end.lives >= policy.max_lives:
        return (
            f"this was life {end.lives} of at most lives.max_lives={policy.max_lives}; {end.text}"
        )
    return None


def avoidable(found: Sequence[str], nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the nodes to avoid; where all of several seem to be at fault it lies elsewhere.

    Args:
        found: nodes that seem to be at fault.
        nodes: nodes of the job.
    """
    return tuple(found) if len(nodes) == 1 or not set(nodes) <= set(found) else ()


def _excluded(end: LifeEnd) -> tuple[str, ...]:
    found = avoidable(end.dead_nodes, end.nodes) + avoidable(end.bad_nodes, end.nodes)
    return tuple(dict.fromkeys(found))


def _ways(end: LifeEnd, policy: LivesConfig) -> tuple[Way, ...]:
    """Return how to start the next life, the best way first.

    A requeued job keeps its id, its dependents and its place in an array, but starts again only
    when all its nodes are free or declared down, which takes minutes for one that does not answer
    (SlurmdTimeout). A new job needs to wait for nobody. Where that came to nothing, more nodes are
    lost than are known (a rack, a switch), and SLURM gets the time to find out which.
    """
    if end.job.is_timeout or end.preempted or end.is_planned:
        return ("requeue", "resubmit")
    is_first = end.progressed or end.fruitless_before == 0
    if policy.restart == "resubmit" or (end.dead_nodes and is_first):
        return ("resubmit", "requeue")
    return ("requeue", "resubmit")
