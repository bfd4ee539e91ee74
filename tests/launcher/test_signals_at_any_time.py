"""Signals that come when nobody waits for one: before a step, during a requeue, after the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from job_stand_in import JOB, StandIn
from one_life import CLUSTER, events, last, live, signal_later

from launcher.cluster import PreflightConfig
from launcher.commands import Command
from launcher.job import JobFacts
from launcher.slurm_commands import step_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def signal_before_the_ranks(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Send a signal in the last moment before the step of the ranks is started."""

    def command(*arguments: Any) -> Command:
        os.kill(os.getpid(), number)
        return step_command(*arguments)

    monkeypatch.setattr("launcher.supervisor.step_command", command)


def test_a_warning_before_the_ranks_start_starts_none(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_before_the_ranks(monkeypatch, signal.SIGUSR1)
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm) == 0
    assert slurm.training() == []
    assert events(slurm) == ["started", "warned", "ended", "requeued"]
    assert "SIGUSR1 came before the step was started" in last(slurm, "ended")["detail"]


def test_sigterm_before_the_ranks_start_starts_none(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SLURM has sent it to the tasks that there were: those that start now would train on.
    signal_before_the_ranks(monkeypatch, signal.SIGTERM)
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm) == 0
    assert slurm.training() == []
    assert last(slurm, "ended")["counts"] is False


def test_ctrl_c_before_the_ranks_start_stops(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_before_the_ranks(monkeypatch, signal.SIGINT)
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm) == 85
    assert slurm.training() == []
    assert events(slurm) == ["started", "warned", "ended"]


def test_a_signal_between_claim_and_check_checks_nothing(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job_facts(**facts: Any) -> JobFacts:
        os.kill(os.getpid(), signal.SIGTERM)
        return JobFacts(**facts)

    monkeypatch.setattr("launcher.supervisor.JobFacts", job_facts)
    cluster = replace(CLUSTER, preflight=PreflightConfig(timeout_seconds=20))
    assert live(slurm, cluster) == 0
    assert slurm.calls("srun") == [call for call in slurm.calls("srun") if call[-1] == "true"]
    assert last(slurm, "ended")["counts"] is False


def test_sigterm_that_comes_twice_is_one(slurm: StandIn) -> None:
    slurm.ranks(
        "write('up'); told('warned'); write('more'); told('warned', 2); save(5); sys.exit(1)"
    )
    threads = [signal_later(slurm, signal.SIGTERM, name) for name in ("up", "more")]
    assert live(slurm) == 0
    for thread in threads:
        thread.join()
    assert events(slurm) == ["started", "warned", "warned", "ended", "requeued"]
    assert slurm.calls("scontrol").count(["requeue", JOB]) == 1


def test_a_warning_while_slurm_is_asked_for_another_life_changes_nothing(slurm: StandIn) -> None:
    slurm.ranks("sys.exit(1)")
    slurm.write("fail-scontrol-requeue", "Unable to contact slurm controller (connect failure)")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        (slurm.folder / "fail-scontrol-requeue").unlink()

    assert live(slurm, nap=nap) == 0
    assert len(naps) == 1
    assert events(slurm) == ["started", "ended", "requeued"]


LATE = """
import os, signal, sys
from launcher.inbox import SIGNALS, SignalInbox
with SignalInbox() as inbox:
    inbox.ignore_ends()
for number in SIGNALS:
    os.kill(os.getpid(), number)
sys.exit(85)
"""


def test_a_signal_after_the_end_does_not_change_the_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 85


BATCH = """
import os, signal, sys
from pathlib import Path
from typing import Any
from launcher import batch
class Over:
    def __init__(self, *_):
        pass
    def run(self):
        return 0
batch.Supervisor = Over
code = batch.run_batch(Path(sys.argv[1]), None)
os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(code)
"""


def test_a_batch_script_ignores_signals_once_it_is_done(slurm: StandIn, tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(f"extends = ['{ROOT}/configs/runs/demo-moe.toml']\n")
    done = subprocess.run(
        [sys.executable, "-c", BATCH, str(run_file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0
