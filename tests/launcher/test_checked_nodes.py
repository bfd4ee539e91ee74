"""The pre-flight of a life: bad nodes are named and left out."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from job_stand_in import JOB, StandIn
from one_life import CLUSTER, events, last, live, signal_later

from launcher.allocation import Allocation
from launcher.cluster import PreflightConfig


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


CHECKED = replace(CLUSTER, preflight=PreflightConfig(timeout_seconds=20))


def report(slurm: StandIn, summary: dict[str, Any], then: str = "") -> None:
    """Let the pre-flight end with this summary."""
    slurm.write(
        "check.py",
        "folder = next(a for a in arguments if a.startswith('--out=')).partition('=')[2]\n"
        "os.makedirs(folder)\n"
        f"open(f'{{folder}}/summary.json', 'w').write(json.dumps({summary!r}))\n{then}",
    )


def test_well_nodes_pass_their_check(slurm: StandIn) -> None:
    report(slurm, {"ok": True, "bad_nodes": []})
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm, CHECKED) == 0
    assert events(slurm) == ["started", "preflight", "ended", "done"]
    check = slurm.calls("srun")[0]
    assert f"--out={slurm.run}/launch/preflight/100-0" in check
    # One node on which the check crashes must not take the others' reports with it.
    assert "--kill-on-bad-exit=0" in check
    assert "--kill-on-bad-exit=1" in slurm.training()[0]
    ports = [variables["MASTER_PORT"] for variables in slurm.surroundings("srun")[:2]]
    assert ports[0] != ports[1]


def test_a_bad_node_is_named_and_excluded(slurm: StandIn) -> None:
    bad = {"node": "n2", "problems": ["3 GPUs instead of 4"], "certain": True}
    report(slurm, {"ok": False, "bad_nodes": [bad]}, "sys.exit(2)")
    assert live(slurm, CHECKED) == 0
    assert slurm.training() == []
    assert events(slurm) == ["started", "preflight", "ended", "requeued"]
    assert "n2: 3 GPUs instead of 4" in last(slurm, "preflight")["detail"]
    assert last(slurm, "requeued")["exclude"] == ["n2"]
    # Only a waiting job takes nodes to avoid, so that comes after the requeue.
    assert slurm.calls("scontrol")[-2:] == [
        ["requeue", JOB],
        ["update", "JobId=100", "ExcNodeList=n2"],
    ]
    # The requeue makes SLURM send SIGTERM to this process and to what it has started.
    assert [call["ignores TERM"] for call in slurm.surroundings("scontrol")[-2:]] == [True, True]


def test_bad_nodes_of_jobs_with_one_node_are_remembered(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for life, node in enumerate(("n1", "n2")):
        allocation = Allocation(JOB, JOB, life, (node,))
        monkeypatch.setattr("one_life.allocation_of", lambda environ, found=allocation: found)
        report(slurm, {"ok": False, "bad_nodes": [{"node": node, "problems": ["slow"]}]})
        assert live(slurm, CHECKED) == 0
        assert last(slurm, "preflight")["exclude"] == [node]
    excluded = [call[-1] for call in slurm.calls("scontrol") if call[0] == "update"]
    assert excluded == ["ExcNodeList=n1", "ExcNodeList=n1,n2"]


def test_a_bad_node_without_a_substitute_is_not_excluded(slurm: StandIn) -> None:
    bad = {"node": "n2", "problems": ["slow"], "certain": True}
    report(slurm, {"ok": False, "bad_nodes": [bad]})
    slurm.write("refuse", "Requested node configuration is not available")
    assert live(slurm, CHECKED) == 0
    assert slurm.calls("scontrol")[-1] == ["requeue", JOB]


def test_where_all_nodes_are_bad_the_fault_lies_elsewhere(slurm: StandIn) -> None:
    bad = [{"node": node, "problems": ["disk full"]} for node in ("n1", "n2")]
    report(slurm, {"ok": False, "bad_nodes": bad})
    for code in (0, 0, 1):
        assert live(slurm, CHECKED) == code
    assert last(slurm, "preflight")["exclude"] == []
    assert "disk full" in last(slurm, "gave_up")["detail"]


def test_a_node_that_never_reports_is_bad(slurm: StandIn) -> None:
    slurm.write(
        "check.py",
        "folder = next(a for a in arguments if a.startswith('--out=')).partition('=')[2]\n"
        "os.makedirs(folder)\n"
        "text = json.dumps({'node': 'n1', 'ok': True, 'problems': []})\n"
        "open(f'{folder}/node-n1.json', 'w').write(text)\n"
        "sys.exit(1)",
    )
    assert live(slurm, CHECKED) == 0
    assert last(slurm, "preflight")["bad_nodes"] == {"n2": "has not answered"}
    assert last(slurm, "requeued")["exclude"] == ["n2"]


def test_reports_that_cannot_be_read_are_held_against_no_node(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    (slurm.run / "launch/preflight/100-0").mkdir(parents=True)
    slurm.write("check.py", "sys.exit(1)")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", stale)
        assert live(slurm, CHECKED) == 0
    assert last(slurm, "preflight")["bad_nodes"] == {}
    assert "Stale file handle" in last(slurm, "preflight")["detail"]
    assert last(slurm, "requeued")["exclude"] == []


def test_a_warning_during_the_check_ends_it(slurm: StandIn) -> None:
    slurm.write("check.py", "write('up'); time.sleep(60)")
    thread = signal_later(slurm, signal.SIGUSR1, "up")
    assert live(slurm, CHECKED) == 0
    thread.join()
    assert events(slurm) == ["started", "warned", "ended", "requeued"]
    assert not [call for call in slurm.calls("scancel") if "--signal=USR1" in call]
