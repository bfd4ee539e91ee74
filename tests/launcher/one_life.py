"""One life of a job under the stand-in of SLURM, run in this process."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from job_stand_in import StandIn

from launcher.allocation import allocation_of
from launcher.batch_run import BatchRun
from launcher.cluster import ClusterConfig, LivesConfig, PreflightConfig
from launcher.inbox import SIGNALS, SignalInbox
from launcher.life_log import LifeLog
from launcher.restart import NewJob
from launcher.slurm_control import SlurmControl
from launcher.step import Pace
from launcher.supervisor import Supervisor

QUICK = Pace(look=0.02, listing=0.05, resend=0.3, margin=0.2, kill=0.5)
CLUSTER = ClusterConfig(
    nodes=2,
    python="/opt/python",
    lives=LivesConfig(warning_seconds=60, grace_seconds=60, srun_wait_seconds=60),
    preflight=PreflightConfig(enabled=False),
)
"""Patient with ranks: a busy machine must not make them late."""
HASTY = replace(CLUSTER, lives=replace(CLUSTER.lives, grace_seconds=1, srun_wait_seconds=1))
"""For ranks that never do what they should."""


def live(slurm: StandIn, cluster: ClusterConfig = CLUSTER, **more: Any) -> int:
    """Run one life and return the exit code of the batch script."""
    slurm.start_again()
    job = NewJob(
        cluster=cluster,
        name="tiny run",
        task="train",
        run_file=slurm.run / "launch/run.toml",
        cluster_file=more.pop("cluster_file", slurm.run / "launch/cluster.toml"),
        overrides=("train.steps=10",),
        run_folder=slurm.run,
        working_folder=slurm.run.parent,
    )
    allocation = allocation_of(os.environ)
    run = BatchRun(
        job,
        allocation,
        last_step=10,
        continues=more.pop("continues", None),
        settings=more.pop("settings", "same"),
    )
    pace = more.pop("pace", QUICK)
    nap = more.pop("nap", lambda seconds: None)
    control = SlurmControl(allocation.number, allocation.job_id, sleep=nap)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with SignalInbox() as inbox:
            return Supervisor(run, control, inbox, pace=pace, **more).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def events(slurm: StandIn) -> list[str]:
    return [record["event"] for record in LifeLog(slurm.run).records()]


def last(slurm: StandIn, event: str) -> Any:
    return [record for record in LifeLog(slurm.run).records() if record["event"] == event][-1]


def jump_later(slurm: StandIn, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the clock of the watch jump by 100 s when the ranks do the work that is returned."""

    def monotonic() -> float:
        return time.monotonic() + 100 * (slurm.folder / "later").exists()

    monkeypatch.setattr("launcher.step.time", SimpleNamespace(monotonic=monotonic))
    # Behind the jump the watch has looked at everything before the ranks go on.
    return "write('later'); listed(2)"


def signal_later(slurm: StandIn, number: signal.Signals, after: str) -> threading.Thread:
    """Send a signal to this process once the ranks have written a file."""

    def send() -> None:
        end = time.monotonic() + 120
        while not (slurm.folder / after).exists() and time.monotonic() < end:
            time.sleep(0.01)
        # Where the life is over already the signal would end the tests.
        if signal.getsignal(number) != signal.SIG_DFL:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread
