"""Lives of a job under a stand-in of SLURM: what is started, recorded and left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from job_stand_in import JOB, StandIn
from one_life import CLUSTER, HASTY, QUICK, events, jump_later, last, live, signal_later
from test_life_log import checkpoint

from launcher.cluster import dump_cluster
from launcher.life_log import LifeLog
from launcher.slurm_control import SlurmControl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def test_a_run_that_ends_is_done(slurm: StandIn) -> None:
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm) == 0
    assert events(slurm) == ["started", "ended", "done"]
    assert last(slurm, "done")["step"] == 10
    assert not [call for call in slurm.calls("scontrol") if call[0] in ("requeue", "update")]
    (step,) = slurm.training()
    assert "/opt/python" in step
    assert step[-1] == "train.steps=10"
    assert slurm.surroundings("srun")[0]["MASTER_PORT"] is not None


def test_a_finished_run_is_not_started_again(slurm: StandIn) -> None:
    slurm.ranks("save(10); outcome('done')")
    assert live(slurm) == 0
    assert live(slurm) == 0
    assert len(slurm.training()) == 1
    assert events(slurm)[3:] == ["done"]
    assert "nothing is left" in last(slurm, "done")["detail"]


def test_a_finished_run_with_more_steps_goes_on(slurm: StandIn) -> None:
    checkpoint(slurm.run / "checkpoints", 5)
    (slurm.run / "outcome.json").write_text('{"outcome": "done"}')
    slurm.ranks(f"assert not os.path.exists('{slurm.run}/outcome.json'); save(10); outcome('done')")
    assert live(slurm) == 0
    assert len(slurm.training()) == 1


def test_the_warning_becomes_a_checkpoint_and_another_life(slurm: StandIn) -> None:
    slurm.ranks("write('up'); until('signal-USR1'); save(5); outcome('resume', 'SIGUSR1')")
    thread = signal_later(slurm, signal.SIGUSR1, "up")
    assert live(slurm) == 0
    thread.join()
    assert events(slurm) == ["started", "warned", "ended", "requeued"]
    assert (last(slurm, "requeued")["step"], last(slurm, "warned")["signal"]) == (5, "SIGUSR1")
    assert ["--signal=USR1", JOB] in slurm.calls("scancel")
    assert slurm.calls("scontrol")[-1] == ["requeue", JOB]


def test_a_warning_that_ranks_miss_is_repeated(slurm: StandIn) -> None:
    slurm.ranks(
        "write('up'); until('signal-USR1'); os.unlink(f'{at}/signal-USR1')\n"
        "until('signal-USR1'); save(5); outcome('resume', 'SIGUSR1')"
    )
    thread = signal_later(slurm, signal.SIGUSR1, "up")
    assert live(slurm) == 0
    thread.join()
    assert len(slurm.calls("scancel")) >= 2
    assert last(slurm, "ended")["reason"] == "SIGUSR1"


def test_without_the_controller_srun_passes_the_warning_on(slurm: StandIn) -> None:
    slurm.write("fail-scancel", "scancel: error: Unable to contact slurm controller")
    slurm.ranks(
        "import signal\n"
        "heard = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))\n"
        "write('up')\n"
        "while not heard: time.sleep(0.01)\n"
        "save(5); outcome('resume', 'SIGUSR1')"
    )
    thread = signal_later(slurm, signal.SIGUSR1, "up")
    assert live(slurm) == 0
    thread.join()
    assert last(slurm, "ended")["reason"] == "SIGUSR1"


def test_the_requeue_is_recorded_before_it_happens(slurm: StandIn) -> None:
    # The stand-in copies the record when it is asked to requeue: SLURM may kill us from there on.
    (slurm.folder / "lives").symlink_to(slurm.run / "launch/lives.jsonl")
    slurm.ranks("save(5); outcome('resume', 'SIGTERM')")
    assert live(slurm) == 0
    assert '"requeued"' in (slurm.folder / "lives-at-requeue").read_text()


def test_ranks_that_do_not_stop_are_killed(slurm: StandIn) -> None:
    slurm.write("steps", "100.0\n100.batch\n")
    slurm.ranks("save(5); write('up'); time.sleep(60)")
    thread = signal_later(slurm, signal.SIGUSR1, "up")
    begin = time.monotonic()
    assert live(slurm, HASTY) == 0
    thread.join()
    assert time.monotonic() - begin < 50
    assert ["--signal=KILL", "100.0"] in slurm.calls("scancel")
    assert "lives.grace_seconds" in last(slurm, "ended")["detail"]
    assert events(slurm)[-1] == "requeued"
    pid = int((slurm.folder / "srun-pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_srun_that_waits_for_a_lost_node_is_ended(slurm: StandIn) -> None:
    slurm.write("dead", "n2")
    slurm.ranks(
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "save(5); outcome('resume', 'LOST_RANK'); time.sleep(60)"
    )
    assert live(slurm, HASTY) == 85
    assert "srun did not" in last(slurm, "ended")["detail"]
    assert last(slurm, "resubmitted")["exclude"] == ["n2"]


def test_an_srun_without_tasks_is_ended(slurm: StandIn) -> None:
    slurm.write("pids", "5 100 0 0 0\n6 100 0 - -\n")
    slurm.ranks("listed(2); os.unlink(f'{at}/pids'); time.sleep(60)")
    assert live(slurm, HASTY) == 0
    assert "srun did not" in last(slurm, "ended")["detail"]


def test_an_srun_that_starts_no_task_is_ended(slurm: StandIn) -> None:
    slurm.ranks("time.sleep(60)")
    begin = time.monotonic()
    assert live(slurm, pace=replace(QUICK, start=0.5)) == 0
    assert time.monotonic() - begin < 50
    assert "srun started no task on the first node" in last(slurm, "ended")["detail"]
    assert last(slurm, "ended")["counts"] is True
    assert events(slurm)[-1] == "requeued"


@pytest.mark.parametrize("seen", ["a task", "no answer"])
def test_a_step_that_may_have_tasks_is_left_alone(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    answer = ("pids", "5 100 0 0 0\n") if seen == "a task" else ("fail-scontrol-listpids", "error")
    later = jump_later(slurm, monkeypatch)
    slurm.ranks(f"listed(2); write{answer}; listed(2); {later}; save(10); outcome('done')")
    assert live(slurm, pace=replace(QUICK, start=90.0)) == 0
    assert last(slurm, "ended")["outcome"] == "done"
    assert "srun started no task" not in last(slurm, "ended")["detail"]


def test_a_supervisor_that_fails_ends_its_ranks_and_the_run_goes_on(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pids: list[int] = []
    noted = slurm.folder / "srun-pid"

    def fail(control: SlurmControl) -> bool:
        end = time.monotonic() + 60
        while not (noted.exists() and noted.read_text()):
            assert time.monotonic() < end
            time.sleep(0.01)
        pids.append(int(noted.read_text()))
        noted.unlink()
        raise RuntimeError("no such luck")

    monkeypatch.setattr(SlurmControl, "has_local_tasks", fail)
    slurm.write("steps", "100.0\n100.batch\n")
    slurm.ranks("time.sleep(60)")
    begin = time.monotonic()
    assert [live(slurm) for _ in range(2)] == [0, 0]
    assert events(slurm) == ["started", "ended", "requeued"] * 2
    # It counts, so it cannot go on for ever.
    assert live(slurm) == 1
    assert time.monotonic() - begin < 100
    assert "the supervisor failed: RuntimeError: no such luck" in last(slurm, "ended")["detail"]
    assert "Traceback" in caplog.text
    assert ["--signal=KILL", "100.0"] in slurm.calls("scancel")
    assert len(pids) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_supervisor_that_fails_still_obeys_the_stop_file(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlurmControl, "dead_nodes", lambda *_: [][0])
    slurm.ranks("sys.exit(1)")
    assert live(slurm) == 0
    assert "IndexError" in last(slurm, "ended")["detail"]
    slurm.ranks(f"open('{slurm.run}/stop', 'w').close(); sys.exit(1)")
    monkeypatch.setattr(
        SlurmControl, "node_address", lambda *_: (slurm.run / "stop").touch() or [][0]
    )
    assert live(slurm) == 85
    assert not (slurm.run / "stop").exists()


def test_an_srun_that_is_only_slow_to_start_is_left_alone(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.ranks(f"listed(2); {jump_later(slurm, monkeypatch)}; save(10); outcome('done')")
    assert live(slurm, HASTY) == 0
    assert last(slurm, "ended")["outcome"] == "done"


def test_an_old_outcome_is_not_taken_for_that_of_this_life(slurm: StandIn) -> None:
    (slurm.run / "outcome.json").write_text('{"outcome": "failed", "retry": false}')
    slurm.ranks("sys.exit(1)")
    assert live(slurm) == 0
    assert last(slurm, "ended")["outcome"] is None
    assert events(slurm)[-1] == "requeued"


def test_a_failure_that_would_repeat_itself_gives_up_at_once(slurm: StandIn) -> None:
    slurm.ranks("outcome('failed', detail='ConfigError: no such data', retry=False); sys.exit(2)")
    assert live(slurm) == 1
    assert events(slurm) == ["started", "ended", "gave_up"]
    assert "no such data" in last(slurm, "gave_up")["detail"]


def test_bad_input_of_a_run_that_has_trained_is_tried_again(slurm: StandIn) -> None:
    bad = (
        "outcome('failed', detail='DataError: no such file', retry=False, exit_code=2); sys.exit(2)"
    )
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 0
    slurm.ranks(bad)
    assert [live(slurm) for _ in range(3)] == [0, 0, 1]
    for part in ("3 failed lives", "no such file", "the run has trained before", "missing mount"):
        assert part in last(slurm, "gave_up")["detail"]
    # Once more by hand, or with another setting: whether that is right nobody knows yet.
    assert live(slurm) == 0
    assert live(slurm, settings="others") == 1
    assert "another start would end the same way" in last(slurm, "gave_up")["detail"]


def test_three_crashes_without_progress_give_up(slurm: StandIn) -> None:
    slurm.ranks("sys.exit(1)")
    assert [live(slurm) for _ in range(2)] == [0, 0]
    assert live(slurm) == 1
    assert "3 failed lives" in last(slurm, "gave_up")["detail"]
    assert len(slurm.training()) == 3


def test_crashes_with_progress_go_on(slurm: StandIn) -> None:
    slurm.ranks("sys.exit(1)")
    assert [live(slurm) for _ in range(2)] == [0, 0]
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 0
    slurm.ranks("sys.exit(1)")
    assert live(slurm) == 0
    assert [record["life"] for record in LifeLog(slurm.run).records()][-1] == 3


def test_lives_that_vanish_give_up_too(slurm: StandIn) -> None:
    log = LifeLog(slurm.run)
    for life in range(3):
        log.append("started", job_id=JOB, life=life)
    assert live(slurm) == 1
    assert slurm.training() == []
    assert events(slurm)[-1] == "gave_up"


@pytest.mark.parametrize("state", ["CANCELLED|None", "COMPLETING|None", "COMPLETING|NodeDown"])
def test_a_job_that_slurm_ends_is_left_to_slurm(slurm: StandIn, state: str) -> None:
    slurm.ranks(f"write('state', '100|{state}\\n'); outcome('resume', 'SIGTERM')")
    assert live(slurm) == 85
    assert events(slurm) == ["started", "ended"]
    assert last(slurm, "ended")["counts"] is False


def test_a_time_limit_without_a_warning_is_survived(slurm: StandIn) -> None:
    slurm.ranks(
        "write('state', '100|COMPLETING|TimeLimit\\n'); write('up')\n"
        "told('requeued'); time.sleep(0.3); save(5)"
    )
    thread = signal_later(slurm, signal.SIGTERM, "up")
    assert live(slurm) == 0
    thread.join()
    assert events(slurm) == ["started", "warned", "ended", "requeued"]
    # The ranks had all the time that SLURM gave them.
    assert (slurm.run / "checkpoints/step-00000005").exists()


def test_a_preemption_before_the_ranks_listen_is_no_failure(slurm: StandIn) -> None:
    slurm.write(
        "job",
        "JobId=100 StartTime=2026-11-21T06:57:23 PreemptEligibleTime=2026-11-21T06:57:23 "
        "PreemptTime=2026-11-21T06:57:25 SuspendTime=None",
    )
    slurm.ranks("sys.exit(143)")
    for _ in range(4):
        assert live(slurm) == 0
    assert last(slurm, "ended")["counts"] is False


def test_a_preemption_of_an_earlier_life_does_not_excuse_this_one(slurm: StandIn) -> None:
    slurm.write("job", " StartTime=2026-11-21T06:57:23 PreemptTime=2026-11-20T06:57:25 ")
    slurm.ranks("sys.exit(143)")
    assert live(slurm) == 0
    assert last(slurm, "ended")["counts"] is True


def test_the_stop_file_is_obeyed_by_the_ranks_and_here(slurm: StandIn) -> None:
    slurm.ranks("save(5); outcome('resume', 'STOP_FILE')")
    assert live(slurm) == 85
    assert events(slurm) == ["started", "ended"]
    (slurm.run / "stop").touch()
    assert live(slurm) == 85
    assert len(slurm.training()) == 1
    assert not (slurm.run / "stop").exists()
    assert events(slurm)[2:] == ["stopped"]


def test_a_stop_file_that_comes_with_a_crash_wins(slurm: StandIn) -> None:
    slurm.ranks(f"open('{slurm.run}/stop', 'w').close(); sys.exit(1)")
    assert live(slurm) == 85
    assert events(slurm) == ["started", "ended"]
    assert not (slurm.run / "stop").exists()


def test_an_array_task_is_never_taken_for_its_array(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    slurm.write("state", "98|CANCELLED|None\n100|RUNNING|None\n")
    slurm.ranks("save(5); outcome('resume', 'SIGTERM')")
    assert live(slurm) == 0
    assert slurm.calls("scontrol")[-1] == ["requeue", "100_3"]
    assert last(slurm, "started")["job_id"] == "100_3"


def test_restarts_by_torchrun_inside_a_life_are_not_cut_short(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = replace(HASTY.lives, worker_restarts=1)
    cluster = replace(HASTY, launcher="torchrun", lives=lives)
    later = jump_later(slurm, monkeypatch)
    slurm.ranks(f"outcome('failed'); listed(2); {later}; save(10); outcome('done')")
    assert live(slurm, cluster) == 0
    assert last(slurm, "ended")["outcome"] == "done"


@pytest.mark.slow
def test_the_command_line_from_the_warning_to_the_requeue(slurm: StandIn) -> None:
    run_file, cluster_file = slurm.run / "run.toml", slurm.run / "cluster.toml"
    run_file.write_text(
        f"extends = ['{ROOT}/configs/runs/demo-moe.toml']\nfolder = '{slurm.run}'\n"
    )
    cluster_file.write_text(dump_cluster(CLUSTER))
    slurm.ranks("write('up'); until('signal-USR1'); save(5); outcome('resume', 'SIGUSR1')")
    batch = subprocess.Popen(
        [sys.executable, "-m", "launcher", "batch", str(run_file), f"--cluster={cluster_file}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not (slurm.folder / "up").exists():
        assert batch.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    batch.send_signal(signal.SIGUSR1)
    output, _ = batch.communicate(timeout=120)
    assert batch.returncode == 0
    assert events(slurm) == ["started", "warned", "ended", "requeued"]
    begins, back = "life 0 begins from the start on n1, n2", "job 100 goes back into the queue"
    for part in (f"[job 100] {begins}", "SIGUSR1: ", f"[job 100] {back}"):
        assert part in output


def test_the_record_is_json_that_others_can_read(slurm: StandIn) -> None:
    slurm.ranks("save(10); outcome('done')")
    live(slurm)
    for line in (slurm.run / "launch/lives.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {"time", "job_id", "life", "event", "step", "nodes", "detail"} <= record.keys()
