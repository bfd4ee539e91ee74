"""What the log says last of each way in which a life can end: one sentence, and what to do."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from job_stand_in import StandIn
from one_life import CLUSTER, live

from launcher.job_state import JobState
from launcher.last_words import LastWords
from launcher.life_log import LifeLog

WORDS = LastWords("7", Path("/runs/a b"), "python -m launcher slurm x.toml")
FOLLOW = "follow it: python -m launcher logs '/runs/a b' -f"
AGAIN = "to go on: python -m launcher slurm x.toml"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def test_one_line_for_each_end() -> None:
    assert WORDS.done("done: step 9", 9) == (
        "the run has come to its end with a checkpoint of step 9 (done: step 9): nothing is left "
        "to do"
    )
    assert WORDS.stopped("stopped on request", None) == (
        f"the run ends here with no checkpoint: stopped on request; {AGAIN}"
    )
    assert WORDS.given_up("3 failed lives", 5) == (
        f"the run is given up with a checkpoint of step 5: 3 failed lives; when that is mended, "
        f"{AGAIN}"
    )
    assert WORDS.requeued("a crash", 5) == (
        "job 7 goes back into the queue and the run goes on by itself from the checkpoint of step "
        f"5; this life ended because: a crash; {FOLLOW}"
    )
    assert WORDS.resubmitted("8", ("n1", "n2"), "a crash", None) == (
        "job 8 takes the place of job 7 without n1, n2 and the run goes on by itself from the "
        f"start; this life ended because: a crash; {FOLLOW}"
    )
    assert WORDS.left_to("8") == f"job 8 goes on with this run: nothing to do here; {FOLLOW}"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", "NODE_FAIL"])
def test_what_slurm_hides_is_left_open(state: str) -> None:
    text = WORDS.taken(JobState(state), 5)
    assert f"SLURM ends job 7 (state {state})" in text
    assert "if it was pre-empted or requeued" in text
    assert text.endswith(f"if it was cancelled, {AGAIN}")


@pytest.mark.parametrize("state", ["PENDING", "REQUEUED", "REQUEUE_HOLD"])
def test_a_job_that_is_in_the_queue_comes_back(state: str) -> None:
    text = WORDS.taken(JobState(state), 5)
    assert "back into the queue" in text
    assert text.endswith(FOLLOW)


def test_reasons_of_several_lines_become_one() -> None:
    assert ": 2 problems: a; b;" in WORDS.given_up("2 problems:\n  a;\n  b", 5)


ENDS = [
    ("save(10); outcome('done', detail='step 10')", "RUNNING", "the run has come to its end"),
    ("save(5); outcome('resume', 'STOP_FILE')", "RUNNING", "the run ends here with a checkpoint"),
    ("save(5); outcome('resume', 'SIGUSR1')", "RUNNING", "job 100 goes back into the queue"),
    ("write('state', '100|COMPLETING|None'); sys.exit(1)", "RUNNING", "SLURM ends job 100"),
    ("outcome('failed', retry=False); sys.exit(2)", "RUNNING", "the run is given up with no"),
]


@pytest.mark.parametrize(("ranks", "state", "begin"), ENDS)
def test_the_log_ends_with_what_has_become_of_the_run(
    slurm: StandIn, caplog: pytest.LogCaptureFixture, ranks: str, state: str, begin: str
) -> None:
    slurm.write("state", f"100|{state}|None\n")
    slurm.ranks(ranks)
    caplog.set_level("INFO")
    live(slurm)
    assert caplog.messages[-1].startswith(begin)


def test_the_log_of_a_job_that_is_replaced_ends_with_the_new_one(
    slurm: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.write("dead", "n2")
    slurm.ranks("save(5); sys.exit(1)")
    caplog.set_level("INFO")
    assert live(slurm) == 85
    assert caplog.messages[-1].startswith("job 101 takes the place of job 100 without n2")


def test_a_run_that_does_not_come_back_by_itself_says_how(
    slurm: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = replace(CLUSTER, lives=replace(CLUSTER.lives, requeue=False))
    slurm.ranks("save(5); outcome('resume', 'SIGUSR1', 'step 5')")
    caplog.set_level("INFO")
    assert live(slurm, cluster) == 85
    text = caplog.messages[-1]
    assert "lives.requeue is false" in text
    command = text.partition("to go on: ")[2]
    launch = slurm.run / "launch"
    assert shlex.split(command) == [
        "cd", str(slurm.run.parent), "&&", "python", "-m", "launcher", "slurm",
        str(launch / "run.toml"), "--cluster", str(launch / "cluster.toml"), "train.steps=10",
    ]  # fmt: skip


def test_a_job_submitted_by_hand_is_submitted_by_hand_again(
    slurm: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.ranks("save(5); outcome('resume', 'STOP_FILE')")
    caplog.set_level("INFO")
    assert live(slurm, cluster_file=None) == 85
    command = caplog.messages[-1].partition("to go on: ")[2]
    assert f"&& sbatch [its options] slurm/train.sbatch {slurm.run}/launch/run.toml" in command


def test_starts_that_have_nothing_to_do_say_so(
    slurm: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (slurm.run / "stop").touch()
    assert live(slurm) == 85
    assert "the stop file was there, so nothing was started" in caplog.messages[-1]
    assert "to go on: cd " in caplog.messages[-1]
    log = LifeLog(slurm.run)
    log.append("started", job_id="100", life=0)
    log.append("resubmitted", job_id="100", life=0, more={"next_job": "55"})
    assert live(slurm) == 85
    assert caplog.messages[-1].startswith("job 55 goes on with this run")
