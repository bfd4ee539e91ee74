"""One life of a job under the stand-in of SLURM, run in this process."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from job_stand_in import StandIn

from launcher.allocation import allocation_of
from launcher.cluster import ClusterConfig, LivesConfig, PreflightConfig
from launcher.inbox import SIGNALS, SignalInbox
from launcher.life_log import LifeLog
from launcher.restart import NewJob
from launcher.slurm_control import SlurmControl
from launcher.step import Pace
from launcher.supervisor import BatchRun, Supervisor

QUICK = Pace(look=0.02, listing=0.05, resend=0.3, margin=0.2, kill=0.5)
CLUSTER = ClusterConfig(
    nodes=2,
    python="/opt/python",
    lives=LivesConfig(warning_seconds=5, grace_seconds=1, srun_wait_seconds=1),
    preflight=PreflightConfig(enabled=False),
)


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


def signal_later(slurm: StandIn, number: signal.Signals, after: str) -> threading.Thread:
    """Send a signal to this process once the ranks have written a file."""

    def send() -> None:
        while not (slurm.folder / after).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread
