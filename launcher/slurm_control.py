"""What a batch job asks SLURM for: its own state, signals, another life, nodes that answer.

Thin wrappers of scontrol, squeue, scancel, srun and sbatch. The job outlives a controller that is
restarted.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from launcher.job_state import JobState
from launcher.slurm_call import Reply, call, job_id_of
from launcher.surroundings import without_job

PROBE_SECONDS = 20.0
"""Time limit of a start on one node. Nodes that are well take a tenth of a second."""
PROBES_AT_ONCE = 16
SUBMIT_SECONDS = 120.0
"""Time limit of sbatch, whose answer should not be missed."""
PAUSE_SECONDS = 5.0
"""Between two attempts to reach a controller that is away."""
OVERTAKEN = "SLURM has started the job again since"
"""The problem of a life that SLURM has given up, though its script and its ranks live on."""


@dataclass
class Dependents:
    """Jobs that wait for one whose place another one takes.

    Attributes:
        moved: those that wait for the other one now.
        left: those that do not: the command that would have changed them, and what it said.
        problem: why it is not known which there are; empty where it is.
    """

    moved: list[str] = field(default_factory=list)
    left: dict[str, tuple[str, str]] = field(default_factory=dict)
    problem: str = ""


class SlurmControl:
    """SLURM, as one job sees it.

    Attributes:
        job_id: number of the job, as its own variables give it; of another job, its name.
        target: the job as commands must name it: an array task is `ARRAY_TASK`, because the number
            of one task is also that of the whole array.
    """

    def __init__(
        self, job_id: str, target: str, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.job_id, self.target = job_id, target
        self._sleep = sleep

    def state(self, attempts: int = 3) -> JobState:
        """Return SLURM's state of the job.

        Args:
            attempts: how often to ask a controller that cannot be reached.
        """
        argv = ("squeue", "--noheader", "--array", "--states=all", f"--jobs={self.target}")
        reply = self._patiently((*argv, "--format=%A|%T|%r|%i"), attempts)
        for line in reply.output.splitlines() if reply.ok else ():
            number, state, reason, name = (line.strip().split("|") + [""] * 4)[:4]
            if self.job_id in (number, name):
                return JobState(state, reason)
        return JobState()

    def own_life(self, restart_count: int, patience_seconds: float = 0.0) -> Reply:
        """Ask whether the job is still in this life; the problem is `OVERTAKEN` where it is not.

        A first node that SLURM has lost from sight may be alive, with the batch script and ranks on
        it. What such a script asks for the job would befall the new life.

        Args:
            restart_count: how often SLURM had started the job before this life.
            patience_seconds: how long to try while the controller cannot be reached.
        """
        argv = ("scontrol", "--oneliner", "show", "job", self.target)
        start = time.monotonic()
        while time.monotonic() - start < (reply := call(argv)).patience(patience_seconds):
            self._sleep(PAUSE_SECONDS)
        # Names and paths may hold anything, so the neighbour is asked for too.
        match = re.search(r"\sRequeue=\d+ +Restarts=(\d+)\s", f"{reply.output} ")
        is_overtaken = reply.ok and match is not None and int(match[1]) > restart_count
        return Reply(problem=OVERTAKEN) if is_overtaken else reply

    def is_preempted(self) -> bool:
        """Whether SLURM has told this life of the job to make room, and still grants it time."""
        reply = self._patiently(("scontrol", "--oneliner", "show", "job", self.target), 3)
        times = {
            key: match[1]
            for key in ("StartTime", "PreemptTime")
            if (match := re.search(rf"\s{key}=(\d{{4}}-[\d:T-]+)", reply.output))
        }
        # A pre-emption of an earlier life may still be remembered; ISO times compare as text.
        return reply.ok and times.get("PreemptTime", "") >= times.get("StartTime", "9")

    def signal_steps(self, name: str) -> Reply:
        """Send a signal to all tasks of all steps, but not to the batch script."""
        return call(("scancel", f"--signal={name}", self.target))

    def step_ids(self) -> tuple[str, ...] | None:
        """Return the ids of the steps that srun has started and that are not over.

        Returns:
            Without the batch script; None where SLURM could not be asked.
        """
        reply = call(("squeue", "--steps", "--noheader", f"--jobs={self.target}", "--format=%i"))
        if not reply.ok:
            return None
        ids = (line.strip() for line in reply.output.splitlines())
        return tuple(found for found in ids if re.fullmatch(r"[\d_]+\.\d+", found))

    def kill_steps(self, seconds: float) -> bool:
        """Kill the tasks of all steps, and wait until SLURM has none left.

        Args:
            seconds: how long to wait; the tasks of a node that is gone stay longer.

        Returns:
            Whether all steps are over.
        """
        end = time.monotonic() + seconds
        while True:
            steps = self.step_ids()
            if steps == ():
                return True
            if steps:
                call(("scancel", "--signal=KILL", *steps))
            if time.monotonic() >= end:
                return False
            self._sleep(min(1.0, seconds))

    def has_local_tasks(self) -> bool | None:
        """Whether tasks of a step run on this node; None where its slurmd could not be asked.

        The controller is not asked: this is cheap enough to be repeated for weeks.
        """
        reply = call(("scontrol", "listpids", self.job_id))
        if not reply.ok:
            return None
        rows = (line.split() for line in reply.output.splitlines())
        return any(len(row) > 2 and row[0].isdigit() and row[2].isdigit() for row in rows)

    def dead_nodes(self, nodes: Sequence[str], seconds: float = PROBE_SECONDS) -> tuple[str, ...]:
        """Return the nodes on which nothing can be started.

        Args:
            nodes: nodes of the job.
            seconds: time that each of them has.
        """

        def answers(node: str) -> bool:
            options = ("--nodes=1", "--ntasks=1", "--cpus-per-task=1", f"--nodelist={node}")
            # Beside what is left of the step before, and without its devices.
            beside = ("--overlap", "--mem=0", "--gres=none", "--immediate=10", "--input=none")
            return call(("srun", *options, *beside, "true"), seconds=seconds).ok

        with ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
            well = list(pool.map(answers, nodes))
        return tuple(node for node, is_well in zip(nodes, well, strict=True) if not is_well)

    def requeue(self, patience_seconds: float, restart_count: int) -> Reply:
        """Put the job back into the queue; SLURM then ends it.

        Args:
            patience_seconds: how long to try while it fails for a reason that may go away.
            restart_count: see `own_life`.
        """
        argv = ("scontrol", "requeue", self.target)
        reply, start = call(argv), time.monotonic()
        while time.monotonic() - start < reply.patience(patience_seconds):
            self._sleep(PAUSE_SECONDS)
            if (own := self.own_life(restart_count)).problem == OVERTAKEN:
                return own
            reply = reply if own.may_pass else call(argv)
        return reply

    def exclude(self, nodes: Sequence[str]) -> Reply:
        """Set the nodes that a waiting job must not use."""
        argv = ("scontrol", "update", f"JobId={self.target}", f"ExcNodeList={','.join(nodes)}")
        return self._patiently(argv, 2)

    def allow_requeue(self, allowed: bool) -> Reply:
        """Say whether SLURM may start the job again by itself, say when a node is lost."""
        argv = ("scontrol", "update", f"JobId={self.target}", f"Requeue={int(allowed)}")
        return self._patiently(argv, 3)

    def submit(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        patience_seconds: float,
        restart_count: int,
    ) -> tuple[str | None, str]:
        """Submit a new job.

        Args:
            argv: sbatch with `--parsable`.
            environment: variables over those of this process, of which what SLURM has set for this
                job is not passed on.
            patience_seconds: how long to try while the controller cannot be reached.
            restart_count: see `own_life`.

        Returns:
            The id of the job, or None with what went wrong.
        """
        everything = {**without_job(os.environ), **environment}
        reply = call(argv, seconds=SUBMIT_SECONDS, environment=everything)
        end = time.monotonic() + patience_seconds
        # Asked twice, a controller that did not answer would start the run twice.
        while reply.is_unsent and time.monotonic() < end:
            self._sleep(PAUSE_SECONDS)
            if (own := self.own_life(restart_count)).problem == OVERTAKEN:
                return None, OVERTAKEN
            if not own.may_pass:
                reply = call(argv, seconds=SUBMIT_SECONDS, environment=everything)
        job_id = job_id_of(reply.output)
        if not reply.ok or job_id is None:
            return None, reply.problem or f"sbatch printed no job id: {reply.output[:200]!r}"
        return job_id, ""

    def refusal(self, argv: Sequence[str], environment: Mapping[str, str]) -> str:
        """Return why a job could never start; empty where it could, or SLURM cannot be asked.

        Args:
            argv: sbatch with its options.
            environment: variables over those of this process.
        """
        everything = {**without_job(os.environ), **environment}
        reply = call((argv[0], "--test-only", *argv[1:]), environment=everything)
        return "" if reply.may_pass else reply.problem

    def node_address(self, node: str) -> str:
        """Return the address at which a node is reached; its name where SLURM does not say."""
        reply = self._patiently(("scontrol", "--oneliner", "show", "node", node), 3)
        match = re.search(r"(?:^|\s)NodeAddr=(\S+)", reply.output) if reply.ok else None
        return match[1] if match else node

    def hand_over_dependents(self, job_id: str) -> Dependents:
        """Let own jobs that wait for this one wait for another one instead.

        Args:
            job_id: the job that takes this one's place.

        Returns:
            What has become of them.
        """
        argv = ("squeue", "--me", "--noheader", "--array", "--states=PENDING", "--format=%i|%E")
        reply = self._patiently(argv, 3)
        found = Dependents(problem=reply.problem)
        for line in reply.output.splitlines() if reply.ok else ():
            waiting, _, dependency = line.strip().partition("|")
            if waiting == job_id:
                continue
            plain = re.sub(r"\([^)]*\)", "", dependency)
            theirs = re.sub(rf"(?<=:){re.escape(self.target)}(?=[:,?+]|$)", job_id, plain)
            if theirs == plain:
                continue
            update = ("scontrol", "update", f"JobId={waiting}", f"Dependency={theirs}")
            change = self._patiently(update, 3)
            if change.ok:
                found.moved.append(waiting)
            else:
                found.left[waiting] = (shlex.join(update), change.problem)
        return found

    def _patiently(self, argv: Sequence[str], attempts: int) -> Reply:
        """Run a command that may be repeated until the controller has answered."""
        for _ in range(attempts - 1):
            reply = call(argv)
            if reply.ok or not reply.may_pass:
                return reply
            self._sleep(PAUSE_SECONDS)
        return call(argv)


def host_names(node_list: str) -> tuple[str, ...]:
    """Return the nodes of a list in SLURM's short form, `node[1-3,7]` (no controller is asked)."""
    reply = call(("scontrol", "show", "hostnames", node_list))
    return tuple(reply.output.split()) if reply.ok else ()
