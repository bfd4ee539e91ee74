"""What can happen to a run on a cluster, one fault at a time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from slurm.scenario import Scenario

Action = Callable[[Scenario], None]
HANG = ("train.hang_timeout_minutes=0.5",)
"""Ranks notice within half a minute that no step comes to its end."""
SLOW = ("train.eval_every=1", "train.eval_sequences=256")
"""Longer steps, with the same losses: a run must not end before SLURM has given a node up."""


def _nothing(scenario: Scenario) -> None:
    del scenario


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: in words.
        play: does it.
        mend: takes it back once the run is on its way again.
        needs_life: whether a new life is what brings the run back.
        in_short: whether continuous integration plays it.
        cluster: lines of TOML for the cluster file.
        overrides: for the run file.
    """

    name: str
    play: Action
    mend: Action = _nothing
    needs_life: bool = True
    in_short: bool = False
    cluster: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def ranks_of(scenario: Scenario) -> list[int]:
    """Return the processes of the run's ranks, as this machine numbers them."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = process.info["cmdline"] or []
        # A rank is `python -u -m mpotrain train FILE`, or `... -m launcher.rank train FILE` under
        # a launcher that starts ranks anew; launchers themselves name modules of their own.
        modules = line[line.index("-m") + 1 : line.index("-m") + 2] if "-m" in line else []
        is_rank = modules in (["mpotrain"], ["launcher.rank"]) and "train" in line
        if is_rank and str(scenario.root) in " ".join(line):
            found.append(process.pid)
    return sorted(found)


def ranks_on(scenario: Scenario, node: str) -> list[int]:
    """Return those of the run's ranks that a job of SLURM has on a node."""
    return [pid for pid in ranks_of(scenario) if _node_of(pid) == node]


def _node_of(pid: int) -> str:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    named = [v.partition(b"=")[2].decode() for v in variables if v.startswith(b"SLURMD_NODENAME=")]
    return named[0] if named else ""


def _rank(number: int, sent: signal.Signals) -> Action:
    def play(scenario: Scenario) -> None:
        os.kill(ranks_on(scenario, scenario.nodes()[-1])[number], sent)

    return play


def _node(method: str, which: int = -1) -> Action:
    def play(scenario: Scenario) -> None:
        getattr(scenario.lab, method)(scenario.nodes()[which])

    return play


def _mend(scenario: Scenario) -> None:
    scenario.lab.mend()


def _cut_for(seconds: float) -> Action:
    def play(scenario: Scenario) -> None:
        node = scenario.nodes()[-1]
        scenario.lab.cut(node)
        time.sleep(seconds)
        scenario.lab.heal(node)

    return play


def _slurmd_away_for(seconds: float) -> Action:
    def play(scenario: Scenario) -> None:
        node = scenario.nodes()[-1]
        scenario.lab.slurmd_kill(node)
        time.sleep(seconds)
        scenario.lab.slurmd_start(node)

    return play


def _preempt(scenario: Scenario) -> None:
    """Submit a job of the partition that goes first, for as many nodes as there are."""
    count = str(scenario.lab.num_nodes)
    options = ["--partition=main", "--exclusive", "--output=/dev/null", f"--nodes={count}"]
    scenario.lab.sbatch([*options, "--wrap=sleep 15"])


RANK_KILLED = Fault("a rank is killed (SIGKILL)", _rank(0, signal.SIGKILL), in_short=True)
PREEMPTED = Fault("a job of higher priority comes", _preempt, cluster=('partition = "low"',))
FAULTS = (
    RANK_KILLED,
    Fault("a node loses its power", _node("kill"), _mend, in_short=True),
    Fault("the first node loses its power", _node("kill", 0), _mend),
    Fault("a node crashes", _node("crash"), _mend),
    Fault("a node freezes", _node("freeze"), _mend, overrides=HANG),
    Fault("a rank freezes (SIGSTOP)", _rank(0, signal.SIGSTOP), overrides=HANG),
    Fault("a network cable is cut", _node("cut"), _mend, overrides=HANG),
    Fault("a network cable is cut for 3 seconds", _cut_for(3.0), needs_life=False),
    # Less, and more, than the 8 seconds after which SLURM gives a node up (SlurmdTimeout).
    Fault("slurmd is away for 3 seconds", _slurmd_away_for(3.0), needs_life=False),
    Fault("slurmd stays dead", _node("slurmd_kill"), _mend, overrides=SLOW),
    Fault("slurmd of the first node stays dead", _node("slurmd_kill", 0), _mend, overrides=SLOW),
    Fault("slurmctld is restarted", lambda s: s.lab.ctl_restart(), needs_life=False),
    PREEMPTED,
)
