"""Submitting: what reaches sbatch, what is left in the run folder, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_fakes import ROOT, Fake, make_fake
from submission_desk import Desk

from launcher.cluster import load_cluster
from launcher.commands import Command
from launcher.life_log import LifeLog
from launcher.sbatch_call import run_sbatch
from launcher.submission import Request, prepare, submit
from mpotrain.config import load_config
from mpotrain.errors import EXIT_BAD_INPUT, EXIT_STORAGE, ConfigError
from mpotrain.provenance import git_diff, git_state


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch)


def test_submission(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.slurm("--name", "first", "--after", "12:any", "train.steps=70") == 0
    (call,) = desk.sbatch.calls()
    options = call["argv"][: call["argv"].index(str(ROOT / "slurm" / "train.sbatch"))]
    assert {
        "--job-name=first", "--nodes=2", "--ntasks-per-node=2", "--partition=main", "--requeue",
        "--signal=B:USR1@120", f"--output={desk.run}/logs/%j.log", f"--chdir={desk.folder}",
        "--dependency=afterany:12", "--parsable", "--export=ALL",
    } <= set(options)  # fmt: skip
    assert call["argv"][len(options) :] == [
        str(ROOT / "slurm" / "train.sbatch"),
        str(desk.launch / "run.toml"),
        f"--cluster={desk.launch / 'cluster.toml'}",
        "--task=train",
    ]
    assert call["environment"]["MPOTRAIN_PYTHON"] == "/opt/python"
    told = capsys.readouterr().out
    assert "job 4711: small: 70 steps of 8 samples on 4 ranks" in told
    assert str(desk.run / "logs" / "4711.log") in told


def test_run_folder_says_what_was_submitted(desk: Desk) -> None:
    assert desk.slurm("train.steps=70") == 0
    run = load_config(desk.launch / "run.toml")
    assert run == load_config(desk.folder / "run.toml", ["train.steps=70"])
    assert load_cluster(desk.launch / "cluster.toml") == load_cluster(desk.folder / "cluster.toml")
    said = json.loads((desk.launch / "submission.json").read_text())
    assert said["job_id"] == "4711"
    assert said["cwd"] == str(desk.folder)
    assert said["task"] == "train"
    assert said["git"] == git_state(ROOT)
    assert said["versions"]["torch"]
    assert "4 ranks" in said["plan"]
    (event,) = LifeLog(desk.run).records()
    assert (event["event"], event["job_id"], event["life"]) == ("submitted", "4711", 0)
    diff = desk.launch / "git.diff"
    assert (diff.read_bytes() if diff.exists() else b"") == git_diff(ROOT)
    assert "parameters" in (desk.launch / "plan.txt").read_text()
    assert (desk.run / "logs").is_dir()  # sbatch does not make it, and the job would be lost
    assert not list(desk.launch.glob("*.tmp-*"))


def test_dry_run_writes_and_queues_nothing(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.slurm("--dry-run") == 0
    (question,) = desk.sbatch.calls()
    assert question["argv"][0] == "--test-only"
    assert not (desk.folder / "runs").exists()
    text = capsys.readouterr().out
    assert (ROOT / "slurm" / "train.sbatch").read_text() in text
    assert "--nodes=2" in text
    assert "MPOTRAIN_PYTHON=/opt/python" in text
    assert "srun" in text


def test_dry_run_needs_no_slurm(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert desk.slurm("--dry-run") == 0
    assert desk.slurm() == EXIT_BAD_INPUT
    assert not (desk.folder / "runs").exists()


def test_dry_run_shows_what_would_be_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.slurm() == 0
    desk.in_queue("4711", "RUNNING")
    assert desk.slurm("--dry-run") == EXIT_BAD_INPUT
    told = capsys.readouterr()
    assert "job 4711 of this run is RUNNING" in told.err
    assert "#SBATCH" in told.out
    monkeypatch.setenv("PATH", "/nonexistent")
    assert desk.slurm("--dry-run", "--after", "12") == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "sbatch is not" in line]
    assert "whether job 4711, 12 is in the queue" in note
    (desk.run / "stop").touch()
    assert desk.slurm("--dry-run") == EXIT_BAD_INPUT
    assert "the stop file is there" in capsys.readouterr().err
    assert len(desk.sbatch.calls()) == 1


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Invalid partition name specified",
        "allocation failure: Unable to contact slurm controller (connect failure)",
        "allocation failure: Socket timed out on send/recv operation",
        "sbatch: unrecognized option '--no-such-option'",
    ],
)
def test_a_dry_run_asks_whether_slurm_takes_the_job(
    desk: Desk, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = make_fake(desk.bin, "sbatch", errors=said, code=1)
    codes, told = [], []
    for dry in ([], ["--dry-run"]):
        codes.append(desk.slurm(*dry))
        told.append(capsys.readouterr())
    assert codes == [EXIT_BAD_INPUT, EXIT_BAD_INPUT]
    assert said in told[1].err
    assert "#SBATCH" in told[1].out  # the commands are shown all the same
    real, asked = sbatch.calls()
    assert asked["argv"] == ["--test-only", *real["argv"]]
    assert asked["environment"]["MPOTRAIN_PYTHON"] == real["environment"]["MPOTRAIN_PYTHON"]


def test_silent_controller_is_seen_in_a_dry_run(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.slurm() == 0
    make_fake(desk.bin, "squeue", errors="Unable to contact slurm controller", code=1)
    assert desk.slurm("--dry-run") == EXIT_BAD_INPUT
    assert "cannot tell whether job 4711" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["real", "dry"])
def test_unknown_job_is_not_waited_for(
    desk: Desk, dry: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_fake(
        desk.bin, "scontrol", errors="slurm_load_jobs error: Invalid job id specified", code=1
    )
    assert desk.slurm("--after", "9999", *dry) == EXIT_BAD_INPUT
    assert "SLURM does not know job 9999" in capsys.readouterr().err
    assert desk.sbatch.calls() == []
    assert not desk.run.exists()


def test_run_that_cannot_run_is_not_queued(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.slurm("engine={kind='local'}", "train.global_batch_size=6") == EXIT_BAD_INPUT
    told = capsys.readouterr().err
    assert "with 4 ranks: engine.kind: the local engine runs one process" in told
    assert "train.global_batch_size: 6" in told
    assert desk.sbatch.calls() == []
    assert not (desk.folder / "runs").exists()


def test_data_of_another_vocabulary_are_seen_before_the_queue(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk.folder / "runs/demo/data").mkdir(parents=True)
    (desk.folder / "runs/demo/data/manifest.json").write_text("{}")
    assert desk.slurm() == EXIT_BAD_INPUT
    assert "runs/demo/data" in capsys.readouterr().err
    assert desk.sbatch.calls() == []


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED"])
def test_active_job_of_the_run_is_not_overwritten(
    desk: Desk, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.slurm() == 0
    before = (desk.launch / "run.toml").read_bytes()
    desk.in_queue("4711", state)
    assert desk.slurm("train.steps=80") == EXIT_BAD_INPUT
    assert f"job 4711 of this run is {state}" in capsys.readouterr().err
    assert len(desk.sbatch.calls()) == 1
    assert (desk.launch / "run.toml").read_bytes() == before


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"])
def test_ended_job_is_followed_by_another(desk: Desk, state: str) -> None:
    assert desk.slurm() == 0
    desk.in_queue("4711", state)
    desk.sbatch = make_fake(desk.bin, "sbatch", output="4712;cluster\n")
    assert desk.slurm("train.steps=80") == 0
    assert load_config(desk.launch / "run.toml").train.steps == 80
    assert [event["job_id"] for event in LifeLog(desk.run).records()] == ["4711", "4712"]


def test_jobs_of_all_lives_count(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.slurm() == 0
    LifeLog(desk.run).append("resubmitted", job_id="4712", life=1)
    desk.in_queue("4712", "RUNNING")
    assert desk.slurm() == EXIT_BAD_INPUT
    assert "job 4712" in capsys.readouterr().err


def test_silent_controller_is_no_leave_to_overwrite(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.slurm() == 0
    make_fake(desk.bin, "squeue", errors="Unable to contact slurm controller", code=1)
    assert desk.slurm() == EXIT_BAD_INPUT
    assert "cannot tell whether job 4711" in capsys.readouterr().err


def test_damaged_record_is_no_leave_to_overwrite(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.slurm() == 0
    for name in ("submission.json", "lives.jsonl"):
        (desk.launch / name).write_text("{")
    assert desk.slurm() == EXIT_BAD_INPUT
    shown = capsys.readouterr().err
    assert "cannot tell whether this run has a job" in shown
    assert "submission.json" in shown
    assert len(desk.sbatch.calls()) == 1


def test_stop_file_would_stop_the_job_at_once(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.run.mkdir(parents=True)
    (desk.run / "stop").touch()
    assert desk.slurm() == EXIT_BAD_INPUT
    assert "stop file" in capsys.readouterr().err
    assert desk.sbatch.calls() == []


@pytest.mark.parametrize(
    ("output", "errors", "code", "expected"),
    [
        ("", "sbatch: error: Invalid partition name", 1, "Invalid partition name"),
        ("", "", 3, "exit code 3"),
    ],
)
def test_refused_job_leaves_no_run_behind(
    desk: Desk,
    capsys: pytest.CaptureFixture[str],
    output: str,
    errors: str,
    code: int,
    expected: str,
) -> None:
    make_fake(desk.bin, "sbatch", output=output, errors=errors, code=code)
    assert desk.slurm() == EXIT_BAD_INPUT
    assert expected in capsys.readouterr().err
    assert not desk.run.exists()


def test_job_that_may_be_queued_keeps_its_files(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    make_fake(desk.bin, "sbatch", output="Submitted!\n")
    assert desk.slurm() == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert "no job id" in said
    assert "see with squeue" in said
    for path in (desk.launch / "run.toml", desk.launch / "cluster.toml", desk.run / "logs"):
        assert path.exists()


def test_job_whose_answer_was_lost_keeps_its_files(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    make_fake(desk.bin, "sbatch", errors=said, code=1)
    assert desk.slurm() == EXIT_BAD_INPUT
    assert "see with squeue" in capsys.readouterr().err
    assert (desk.launch / "run.toml").exists()


def test_site_that_lets_sbatch_say_more(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_WAIT", "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    sbatch = make_fake(desk.bin, "sbatch", output="123 core hours are left\n4711;cluster\n")
    assert desk.slurm() == 0
    assert json.loads((desk.launch / "submission.json").read_text())["job_id"] == "4711"
    environment = sbatch.calls()[-1]["environment"]
    assert "SBATCH_WAIT" not in environment
    assert environment["SBATCH_ACCOUNT"] == "mine"


def test_refused_job_leaves_an_earlier_run_alone(desk: Desk) -> None:
    assert desk.slurm() == 0
    (desk.run / "checkpoints").mkdir()
    make_fake(desk.bin, "sbatch", code=1)
    assert desk.slurm() == EXIT_BAD_INPUT
    assert json.loads((desk.launch / "submission.json").read_text())["job_id"] == "4711"
    assert (desk.run / "checkpoints").is_dir()


@pytest.mark.parametrize("missing", ["submission.json", "lives.jsonl", "both"])
def test_job_that_cannot_be_recorded_is_told_all_the_same(
    desk: Desk, missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM has taken the job: without its number nobody could cancel it."""
    names = ["submission.json", "lives.jsonl"] if missing == "both" else [missing]

    def submit_and_obstruct(command: Command) -> str:
        job_id = run_sbatch(command)
        for name in names:
            # A folder of that name: no file can be written there, not even by root.
            (desk.launch / name).mkdir(parents=True)
        return job_id

    monkeypatch.setattr("launcher.submission.run_sbatch", submit_and_obstruct)
    assert desk.slurm() == 0
    told = capsys.readouterr()
    assert "job 4711: small" in told.out
    assert "warning: job 4711 is in the queue" in told.err
    assert "scancel 4711" in told.err
    assert "run the same command again" not in told.err
    if missing == "submission.json":
        assert [event["job_id"] for event in LifeLog(desk.run).records()] == ["4711"]


def test_two_submissions_at_once(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "code").write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "from launcher.launch_folder import LaunchFolder\n"
        f"with LaunchFolder(Path({str(desk.run)!r})).claimed():\n"
        "    print('claimed', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, str(tmp_path / "code")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        assert desk.slurm() == EXIT_BAD_INPUT
        assert desk.sbatch.calls() == []
    finally:
        other.communicate()
    assert desk.slurm() == 0


def test_folder_that_cannot_be_written(desk: Desk) -> None:
    (desk.folder / "runs").write_text("a file")
    assert desk.slurm() == EXIT_STORAGE
    assert desk.sbatch.calls() == []


def test_job_inherits_no_other_job(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {"SLURM_MEM_PER_NODE": "1", "SLURM_JOB_ID": "3", "RANK": "0", "MASTER_PORT": "1"}
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    monkeypatch.setenv("MY_OWN", "kept")
    assert desk.slurm() == 0
    seen = desk.sbatch.calls()[0]["environment"]
    assert not foreign.keys() & seen.keys()
    assert (seen["SLURM_CONF"], seen["MY_OWN"]) == ("/etc/other.conf", "kept")


def test_fine_tuning(desk: Desk) -> None:
    (desk.folder / "run.toml").write_text(f"extends = ['{ROOT}/configs/tune/demo-mrpc.toml']\n")
    request = Request(
        run_file=Path("run.toml"),
        cluster_file=Path("cluster.toml"),
        task="tune",
        overrides=("engine={kind='deepspeed', device='cpu'}", "train.global_batch_size=32"),
    )
    submission = prepare(request)
    assert submission.command.argv[-1] == "--task=tune"
    assert submit(submission) == "4711"
    with pytest.raises(ConfigError, match="fine-tuning"):
        prepare(Request(run_file=Path("run.toml"), cluster_file=Path("cluster.toml")))


def test_unanswered_fake_is_no_call(desk: Desk) -> None:
    assert Fake(desk.bin / "none", desk.bin / ".none.calls").calls() == []
