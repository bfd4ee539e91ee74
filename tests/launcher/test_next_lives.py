"""How the next life comes about: the job once more, or a new job in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from job_stand_in import JOB, StandIn
from launch_fakes import ROOT
from one_life import CLUSTER, events, last, live, signal_later

from launcher.cluster import dump_cluster
from launcher.life_log import LifeLog


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def test_a_dead_node_is_left_out_by_a_new_job(slurm: StandIn) -> None:
    slurm.write("dead", "n2")
    slurm.write("dependents", "200|afterok:100(unfulfilled),afterany:7\n201|afterok:1001\n")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 85
    assert events(slurm) == ["started", "ended", "resubmitted"]
    record = last(slurm, "resubmitted")
    assert (record["next_job"], record["exclude"]) == ("101", ["n2"])
    submitted = slurm.calls("sbatch")[-1]
    assert "--exclude=n2" in submitted
    assert "--job-name=tiny_run" in submitted
    assert submitted[-2:] == ["--continues=100", "train.steps=10"]
    # What SLURM has set for this job would be taken for options of the new one.
    assert slurm.surroundings("sbatch")[-1]["SLURM_NTASKS"] is None
    changes = [call for call in slurm.calls("scontrol") if call[0] == "update"]
    assert changes == [
        ["update", "JobId=100", "Requeue=0"],
        ["update", "JobId=200", "Dependency=afterok:101,afterany:7"],
    ]


def test_the_name_of_the_job_stays(slurm: StandIn) -> None:
    """That of `--name` or of an array: `cancel` looks for a new job by the name of the old one."""
    run_file, cluster_file = slurm.run / "run.toml", slurm.run / "cluster.toml"
    run_file.write_text(
        f"extends = ['{ROOT}/configs/runs/demo-moe.toml']\nfolder = '{slurm.run}'\n"
    )
    cluster_file.write_text(dump_cluster(CLUSTER))
    slurm.write("dead", "n2")
    slurm.ranks("save(5); sys.exit(1)")
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "batch", str(run_file), f"--cluster={cluster_file}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_NAME": "sweep-tuned"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 85, done.stderr
    assert "--job-name=sweep-tuned" in slurm.calls("sbatch")[-1]


def test_jobs_that_keep_waiting_for_the_old_job_are_named(
    slurm: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.write("dead", "n2")
    slurm.write("dependents", "200|afterok:100(unfulfilled)\n201|afterany:100,afterok:7\n")
    slurm.write("fail-scontrol-update", "Access/permission denied")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 85
    for job, dependency in ("200", "afterok:101"), ("201", "afterany:101,afterok:7"):
        (line,) = [text for text in caplog.messages if f"job {job} still waits" in text]
        assert "permission denied" in line
        assert f"scontrol update JobId={job} Dependency={dependency}" in line


def test_jobs_that_may_wait_for_the_old_job_cannot_always_be_listed(
    slurm: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.write("dead", "n2")
    slurm.write("fail-squeue", "Access/permission denied")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 85
    (line,) = [text for text in caplog.messages if "may never start" in text]
    assert "permission denied" in line
    assert "--format='%i %E'" in line


def test_without_enough_nodes_the_job_waits_for_its_own(slurm: StandIn) -> None:
    slurm.write("dead", "n2")
    slurm.write("refuse", "sbatch: error: Requested node configuration is not available")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 0
    assert events(slurm)[-1] == "requeued"
    assert ["requeue", JOB] in slurm.calls("scontrol")


def test_a_job_without_a_cluster_file_is_requeued(slurm: StandIn) -> None:
    slurm.write("dead", "n2")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm, cluster_file=None) == 0
    assert events(slurm)[-1] == "requeued"


def test_a_probe_that_fails_everywhere_excludes_nobody(slurm: StandIn) -> None:
    slurm.write("dead", "n1 n2")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 0
    assert events(slurm)[-1] == "requeued"


def test_a_job_that_cannot_be_requeued_is_resubmitted(slurm: StandIn) -> None:
    slurm.write("fail-scontrol-requeue", "Requested operation is presently disabled")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 85
    assert events(slurm)[-2:] == ["requeued", "resubmitted"]


def test_where_nothing_helps_the_reason_is_readable(slurm: StandIn) -> None:
    slurm.write("fail-scontrol-requeue", "Requested operation is presently disabled")
    slurm.write("refuse", "sbatch: error: Invalid account")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 1
    detail = last(slurm, "gave_up")["detail"]
    assert "presently disabled" in detail
    assert "Invalid account" in detail


def test_a_job_that_had_given_way_may_come_back_again(slurm: StandIn) -> None:
    """Otherwise `scontrol requeue` would be refused: the job had been told not to come back."""
    slurm.write("dead", "n2")
    slurm.write("fail-sbatch", "sbatch: error: Socket timed out on send/recv operation")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 0
    calls = slurm.calls("scontrol")
    requeue = calls.index(["requeue", JOB])
    updates = [call for call in calls[:requeue] if "Requeue" in call[-1]]
    assert updates[0][-1] == "Requeue=0"
    assert [call[-1] for call in updates[-2:]] == ["Requeue=1"] * 2


def test_a_controller_that_is_away_is_waited_for(slurm: StandIn) -> None:
    slurm.write("fail-scontrol-requeue", "Unable to contact slurm controller (connect failure)")
    slurm.ranks("save(5); sys.exit(1)")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            (slurm.folder / "fail-scontrol-requeue").unlink()

    assert live(slurm, nap=nap) == 0
    assert len(naps) == 3
    assert events(slurm)[-1] == "requeued"


def follow(slurm: StandIn, *records: tuple[str, dict[str, Any]]) -> None:
    """Write what the job 90, whose place this one takes, has left."""
    log = LifeLog(slurm.run)
    log.append("started", job_id="90", life=0)
    for event, more in records:
        log.append(event, job_id="90", life=0, more=more)  # type: ignore[arg-type]


def test_a_new_job_takes_the_place_of_another(slurm: StandIn) -> None:
    follow(slurm, ("ended", {"counts": True}), ("resubmitted", {"next_job": JOB}))
    slurm.ranks("sys.exit(1)")
    assert live(slurm, continues="90") == 0
    started = last(slurm, "started")
    assert (started["life"], started["continues"]) == (1, "90")
    assert live(slurm, continues="90") == 1
    assert "3 failed lives" in last(slurm, "gave_up")["detail"]


def test_a_new_job_leaves_where_the_other_came_back(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.succession.CLAIM_SECONDS", -1.0)
    # It had got no answer from sbatch, and put itself back into the queue.
    follow(slurm, ("ended", {"counts": True}), ("requeued", {}))
    slurm.write("state", "90|REQUEUED|BeginTime|90\n")
    assert live(slurm, continues="90") == 85
    assert slurm.training() == []
    follow(slurm, ("resubmitted", {"next_job": "55"}))
    assert live(slurm, continues="90") == 85
    assert slurm.training() == []


def test_a_new_job_goes_on_where_the_other_only_wanted_to_come_back(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line comes before the deed: SLURM may have refused it, and killed the job after that."""
    monkeypatch.setattr("launcher.succession.CLAIM_SECONDS", -1.0)
    follow(slurm, ("ended", {"counts": True}), ("requeued", {}))
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm, continues="90") == 0
    assert len(slurm.training()) == 1


def test_a_new_job_waits_for_the_word_of_the_other(slurm: StandIn) -> None:
    follow(slurm)

    def sleep(seconds: float) -> None:
        LifeLog(slurm.run).append("resubmitted", job_id="90", life=0, more={"next_job": JOB})

    slurm.ranks("save(10); outcome('done')")
    assert live(slurm, continues="90", sleep=sleep) == 0
    assert len(slurm.training()) == 1


def test_a_new_job_goes_on_where_the_other_could_not_name_it(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a dead node the other one is COMPLETING for minutes."""
    monkeypatch.setattr("launcher.succession.CLAIM_SECONDS", -1.0)
    follow(slurm, ("ended", {"counts": True, "decision": "restart"}))
    slurm.write("state", "90|COMPLETING|NodeFail|90\n100|RUNNING|None\n")
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm, continues="90") == 0
    assert len(slurm.training()) == 1


def test_a_new_job_leaves_to_one_that_came_back_without_a_word(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.succession.CLAIM_SECONDS", -1.0)
    follow(slurm, ("ended", {"counts": True, "decision": "restart"}))
    slurm.write("state", "90|REQUEUED|BeginTime|90\n")
    assert live(slurm, continues="90") == 85
    assert slurm.training() == []


@pytest.mark.parametrize("lines", [[], [("ended", {"counts": True, "decision": "restart"})]])
def test_a_new_job_waits_longer_for_one_that_has_trouble_to_write(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch, lines: list[tuple[str, dict[str, Any]]]
) -> None:
    monkeypatch.setattr("launcher.succession.CLAIM_SECONDS", -1.0)
    follow(slurm, *lines)
    slurm.write("state", "90|RUNNING|None|90\n100|RUNNING|None\n")
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            LifeLog(slurm.run).append("resubmitted", job_id="90", life=0, more={"next_job": JOB})

    slurm.ranks("save(10); outcome('done')")
    assert live(slurm, continues="90", sleep=sleep) == 0
    assert (len(naps), len(slurm.training())) == (3, 1)
    # Not for ever.
    follow(slurm, *lines)
    monkeypatch.setattr("launcher.succession.LATE_SECONDS", 0.0)
    assert live(slurm, continues="90") == 85


def test_a_new_job_asks_for_a_silent_task_of_an_array(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A task of an array has a number of its own (98) beside its name.
    slurm.write("state", "98|RUNNING|None|90_3\n")
    LifeLog(slurm.run).append("started", job_id="90_3", life=0)
    monkeypatch.setattr("launcher.succession.CLAIM_SECONDS", -1.0)
    monkeypatch.setattr("launcher.succession.LATE_SECONDS", 0.0)
    assert live(slurm, continues="90_3") == 85
    assert slurm.training() == []


def test_a_job_that_was_replaced_leaves_when_slurm_starts_it_again(slurm: StandIn) -> None:
    log = LifeLog(slurm.run)
    log.append("started", job_id=JOB, life=0)
    log.append("resubmitted", job_id=JOB, life=0, more={"next_job": "55"})
    assert live(slurm) == 85
    assert slurm.training() == []


def test_a_requeue_whose_answer_is_late_is_no_failure(slurm: StandIn) -> None:
    slurm.ranks("save(5); sys.exit(1)")
    slurm.write("fail-scontrol-requeue", "Requested operation is presently disabled")
    slurm.write("then-state", "100|PENDING|BeginTime\n")
    assert live(slurm) == 0
    assert events(slurm)[-1] == "requeued"


TIME_IS_UP = "100|COMPLETING|TimeLimit\n"
REFUSED = "Requested operation is presently disabled"


def time_is_up(slurm: StandIn, **more: Any) -> int:
    """Run a life that SLURM ends because its time is over."""
    slurm.ranks(f"write('state', {TIME_IS_UP!r}); write('up'); told('warned'); save(5)")
    thread = signal_later(slurm, signal.SIGTERM, "up")
    code = live(slurm, **more)
    thread.join()
    return code


def test_a_requeue_that_is_refused_when_the_time_is_up_is_no_success(slurm: StandIn) -> None:
    """The job is COMPLETING in any case, which says nothing of the requeue."""
    slurm.write("fail-scontrol-requeue", REFUSED)
    slurm.write("steps", "100.0\n")
    assert time_is_up(slurm) == 85
    assert events(slurm)[-2:] == ["requeued", "resubmitted"]
    submitted = slurm.calls("sbatch")[-1]
    # The ranks of the old job may still write: they are left alone, and the new job waits for them.
    assert "--dependency=afterany:100" in submitted
    assert "--continues=100" in submitted
    assert slurm.calls("scancel") == []
    assert [call for call in slurm.calls("scontrol") if call[0] == "update"] == []


def test_a_new_job_keeps_its_own_dependency(slurm: StandIn) -> None:
    slurm.write("fail-scontrol-requeue", REFUSED)
    slurm.write("dependents", "101|afterany:100(unfulfilled)\n200|afterok:100(unfulfilled)\n")
    assert time_is_up(slurm) == 85
    changes = [call for call in slurm.calls("scontrol") if call[0] == "update"]
    assert changes == [["update", "JobId=200", "Dependency=afterok:101"]]


def test_where_nothing_helps_when_the_time_is_up_the_run_is_given_up(slurm: StandIn) -> None:
    slurm.write("fail-scontrol-requeue", REFUSED)
    assert time_is_up(slurm, cluster_file=None) == 1
    assert "presently disabled" in last(slurm, "gave_up")["detail"]


def test_a_requeue_without_an_answer_is_believed_where_the_job_began_to_leave(
    slurm: StandIn,
) -> None:
    slurm.ranks("save(5); sys.exit(1)")
    slurm.write("fail-scontrol-requeue", REFUSED)
    slurm.write("then-state", "100|COMPLETING|None\n")
    assert live(slurm) == 0
    assert events(slurm)[-1] == "requeued"


def again(slurm: StandIn, restarts: int) -> None:
    """Let SLURM say how often it has started the job again."""
    slurm.write("job", f"JobId=100 JobState=RUNNING Requeue=1 Restarts={restarts} BatchFlag=1\n")


def test_the_life_that_slurm_knows_is_requeued(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    slurm.ranks("save(5); sys.exit(1)")
    again(slurm, 3)
    assert live(slurm) == 0
    assert events(slurm)[-1] == "requeued"


def test_a_life_that_was_cut_off_looks_again_when_slurm_answers(slurm: StandIn) -> None:
    """What was asked for in vain must not befall the life that SLURM has started meanwhile."""
    slurm.ranks("save(5); sys.exit(1)")
    again(slurm, 0)
    slurm.write("fail-scontrol-requeue", "Unable to contact slurm controller (connect failure)")

    def nap(seconds: float) -> None:
        again(slurm, 1)
        (slurm.folder / "fail-scontrol-requeue").unlink(missing_ok=True)

    assert live(slurm, nap=nap) == 85
    assert slurm.calls("scontrol").count(["requeue", JOB]) == 1
    assert slurm.calls("sbatch") == []


def test_nothing_is_touched_before_slurm_has_said_which_life_this_is(slurm: StandIn) -> None:
    slurm.ranks("save(5); sys.exit(1); ")
    slurm.write("dead", "n2")
    slurm.write("fail-scontrol---oneliner", "Unable to contact slurm controller (connect failure)")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 9:
            assert slurm.calls("sbatch") == []
            again(slurm, 1)
            (slurm.folder / "fail-scontrol---oneliner").unlink()

    assert live(slurm, nap=nap) == 85
    assert len(naps) == 9
    assert slurm.calls("sbatch") == []
