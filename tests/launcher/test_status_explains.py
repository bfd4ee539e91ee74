"""`status` says why states are unknown, and why runs wait, never started or cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurm_commands_fake import FakeSlurm, make_run, train_line

from launcher import cli, status
from launcher.run_reader import read_run
from launcher.slurm_queue import SlurmQueue

NO_SOURCE = """\
squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host
squeue: error: fetch_config: DNS SRV lookup failed
squeue: error: _establish_config_source: failed to fetch config
squeue: fatal: Could not establish a configuration source"""
"""What squeue says on a machine that has it but belongs to no cluster."""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "bin", monkeypatch)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines of `status runs`, from a folder that holds `runs`."""
    assert cli.main(["status", "runs"]) == 0
    return capsys.readouterr().out.splitlines()


def make_dependent(folder: Path, job_id: str, condition: str) -> Path:
    run = make_run(folder, job_id=job_id)
    submission = {"job_id": job_id, "sbatch": ["sbatch", f"--dependency={condition}", "--x"]}
    (run / "launch" / "submission.json").write_text(json.dumps(submission))
    return run


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (NO_SOURCE, "squeue: Could not establish a configuration source"),
        (
            "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
            "squeue: slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        ),
        ("squeue: error: one thing\n  and\tanother\n", "squeue: one thing; and another"),
        (None, "squeue is not installed here"),
    ],
)
def test_a_queue_that_cannot_be_asked_is_one_line(
    slurm: FakeSlurm,
    trouble: str | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if trouble is None:
        monkeypatch.setenv("PATH", "/nowhere")
    slurm.set(trouble={"squeue": trouble})
    lives = [{"event": "started", "job_id": "12", "nodes": ["n1"]}]
    make_run(Path("runs/a"), job_id="11", metrics=[train_line(60)])
    make_run(Path("runs/b"), job_id="12", lives=lives)
    make_run(Path("runs/c"), job_id="13", outcome={"outcome": "done"})
    heading, *rows, line, last_words = shown(capsys)
    assert [row.split()[1] for row in rows] == ["unknown", "unknown", "done"]
    assert "60/100" in rows[0]
    assert line == f"states of jobs are unknown, no word of the queue: {words}"
    assert last_words == "runs/b: unknown: last heard: started"
    assert heading.split()[:3] == ["run", "state", "job"]


def test_no_word_of_the_queue_where_no_run_has_a_job(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.set(trouble={"squeue": NO_SOURCE})
    make_run(Path("runs/a"))
    assert len(shown(capsys)) == 2


def test_the_table_says_what_a_job_waits_for(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("runs/a"), job_id="11")
    slurm.add("11", "PENDING", reason="ReqNodeNotAvail, UnavailableNodes:n[1-4]")
    make_run(Path("runs/b"), job_id="12")
    slurm.add("12", "PENDING", reason="AssocMaxJobsLimit")
    make_run(Path("runs/c"), job_id="13")
    slurm.add("13", "PENDING", reason="launch failed requeued held")
    _, first, second, third = shown(capsys)
    assert "queued (launch failed requeued held: scontrol release 13)" in third
    assert "queued (ReqNodeNotAvail, UnavailableNodes:n[1-4])" in first
    assert "queued (AssocMaxJobsLimit)" in second


def test_a_run_that_waited_in_vain_names_what_it_waited_for(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("runs/a"), job_id="11_3", outcome={"outcome": "failed", "detail": "boom"})
    make_dependent(Path("runs/b"), "12", "afterok:11_3")
    make_dependent(Path("runs/c"), "13", "afterok:12:11_3")
    make_dependent(Path("runs/d"), "14", "afterany:11_3")
    make_dependent(Path("runs/e"), "15", "afterok:99,afterany:11_3")
    make_dependent(Path("runs/f"), "16", "afterok:11_3")
    slurm.add("12", "CANCELLED", reason="Dependency")  # the queue has forgotten 13, 14 and 15
    slurm.add("16", "PENDING", reason="Dependency")
    lines = shown(capsys)
    words = [line.split()[1] for line in lines[1:7]]
    assert words == ["failed", "cancelled", "cancelled", "lost", "lost", "queued"]
    vain = "it waited for the good end of"
    assert lines[7:] == [
        f"runs/b: cancelled: job 12 ended as CANCELLED, and it never started: {vain} runs/a, "
        "which did not come; submit both again",
        f"runs/c: cancelled: job 13 is no longer in the queue, and it never started: {vain} "
        "runs/b, runs/a, which did not come; submit both again",
        "runs/d: lost: job 14 is no longer in the queue, and it never started",
        f"runs/e: lost: job 15 is no longer in the queue, and it never started: {vain} job 99",
    ]


def test_a_parent_that_goes_on_is_not_called_failed(slurm: FakeSlurm) -> None:
    make_run(Path("runs/a"), job_id="11")
    slurm.add("11", "RUNNING")
    run = make_dependent(Path("runs/b"), "12", "afterok:11")
    state = status.gather([Path("runs/a"), run], SlurmQueue())[0][1][1]
    assert state.word == "lost"
    assert state.detail.endswith("it waited for the good end of job 11")


def test_a_run_that_began_did_not_wait_in_vain(slurm: FakeSlurm) -> None:
    make_run(Path("runs/a"), job_id="11", outcome={"outcome": "failed"})
    run = make_dependent(Path("runs/b"), "12", "afterok:11")
    (run / "launch" / "lives.jsonl").write_text('{"event": "started", "job_id": "12"}\n')
    slurm.add("12", "CANCELLED")
    runs, _ = status.gather([Path("runs/a"), run], SlurmQueue())
    assert runs[1][1].detail == "job 12 ended as CANCELLED, and it left no word"


@pytest.mark.parametrize(
    "sbatch", [None, 5, "--dependency=afterok:1", [1, ["--dependency=afterok:1"], "--dependency="]]
)
def test_any_command_of_sbatch_can_be_read(tmp_path: Path, sbatch: object) -> None:
    run = make_run(tmp_path / "run")
    (run / "launch" / "submission.json").write_text(json.dumps({"sbatch": sbatch}))
    assert read_run(run).waits_for == ()


def test_runs_that_cannot_be_read_are_not_called_new(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("runs/new"))
    for name in ("a", "b"):
        make_run(Path("runs") / name, job_id="11")
    Path("runs/a/launch/submission.json").write_text('{"job_id": "1')
    Path("runs/b/launch/submission.json").unlink()
    Path("runs/b/launch/lives.jsonl").write_bytes(b"\x00" * 80)
    slurm.add("11", "RUNNING")
    lines = shown(capsys)
    assert [line.split()[1] for line in lines[1:4]] == ["damaged", "damaged", "new"]
    assert lines[4:] == [
        "runs/a: launch/submission.json: is no JSON object (damaged or half written)",
        "runs/b: launch/lives.jsonl: 1 damaged line(s): 1",
    ]


@pytest.mark.parametrize("seconds", ["0", "0.2", "-3", "nan", "inf", "1e9"])
def test_watching_without_a_pause_is_refused(
    seconds: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("runs/a"), job_id="11")
    assert cli.main(["status", "runs", f"--watch={seconds}"]) == 2
    assert "--watch: must be 1 to 86400 seconds, is" in capsys.readouterr().err
    assert slurm.calls("squeue") == []


def test_a_run_that_was_stopped_before_it_began_is_not_lost(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = {"event": "stopped", "job_id": "11", "detail": "the stop file was there"}
    make_run(Path("runs", "a"), job_id="11", lives=[stopped])
    table = "\n".join(shown(capsys))
    assert "stopped" in table
    assert "lost" not in table
