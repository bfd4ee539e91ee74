"""Sweeps in SLURM's queue: jobs, arrays, dependencies, and the same command again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch_fakes import ROOT, RUN_FILE
from slurm_commands_fake import FakeSlurm
from sweep_cases import CHAINED, GRID, command, end, slurm

from launcher import array_task, cli
from launcher.launch_error import LaunchError
from launcher.launch_folder import LaunchFolder
from launcher.life_log import LifeLog
from launcher.run_reader import read_run
from launcher.sweep_array import ArrayTask, read_task, write_index
from launcher.sweep_file import load_sweep
from launcher.sweep_points import expand
from mpotrain.config import load_config
from mpotrain.errors import ConfigError, MpotrainError, StorageError

__all__ = ["slurm"]


def test_every_point_gets_a_job_and_its_run_folder(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(GRID, "train.log_every=5") == 0
    assert len(slurm.calls("sbatch")) == 4
    run = load_config(Path("runs/sweep/lr-0.001-seed-2/launch/run.toml"))
    assert (run.train.seed, run.train.steps, run.train.log_every) == (2, 60, 5)
    assert read_run(Path("runs/sweep/lr-0.0003-seed-2")).job_ids == ("503",)
    out = capsys.readouterr().out
    assert "runs/sweep/lr-0.0003-seed-2: job 503" in out
    assert "4 of 4 runs submitted" in out


def test_a_dry_run_writes_and_queues_nothing(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--array", "--max-running", "2"]):
        assert command(GRID, "--dry-run", *arguments) == 0
    assert not Path("runs").exists()
    out = capsys.readouterr().out
    assert "--array=0-3%2" in out
    assert out.count("train.sbatch") == 4
    # SLURM is asked once for all, and queues nothing.
    one, array = slurm.calls("sbatch")
    assert one[1] == array[1] == "--test-only"
    assert "--array=0-3%2" in array


def test_a_dry_run_of_stages_asks_for_a_job_that_waits_for_none(slurm: FakeSlurm) -> None:
    assert command(CHAINED, "--dry-run") == 0
    (asked,) = slurm.calls("sbatch")
    assert asked[1] == "--test-only"
    assert not any(option.startswith("--dependency") for option in asked)


def test_a_dry_run_says_that_slurm_refuses_the_jobs(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.set(trouble={"sbatch": "Batch job submission failed: Invalid partition name specified"})
    with pytest.raises(LaunchError, match=r"--test-only refuses the job: .*Invalid partition"):
        command(GRID, "--dry-run")
    out = capsys.readouterr().out
    assert "train.sbatch" in out
    assert "in the queue" not in out


def test_all_problems_of_all_points_before_anything_is_submitted(slurm: FakeSlurm) -> None:
    bad = GRID.replace("train.seed = [1, 2]", "train.global_batch_size = [8, 6]\n").replace(
        "seed-{train.seed}", "{train.global_batch_size}"
    )
    with pytest.raises(ConfigError) as caught:
        command(bad.replace("train.steps = 60", "train.steps = 60\ntrain.log_every = 0"))
    problems = caught.value.problems
    assert any("train.log_every" in line and "in all 4 runs" in line for line in problems)
    with pytest.raises(ConfigError) as caught:
        command(bad)
    (problem,) = caught.value.problems
    assert "grid.train.global_batch_size: with 4 ranks: 6 sequences" in problem
    assert "(in lr-0.001-6, lr-0.0003-6)" in problem
    assert slurm.calls("sbatch") == []
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "expected"),
    [
        (("train.steps = 60", "train.steps = 0"), (), "sweep.toml: fixed.train.steps: must be"),
        (("[1, 2]", "[1, true]"), (), "sweep.toml: grid.train.seed: input should be"),
        (("[1, 2]", "[1, 2]\ntrain.nonsense = [3]"), (), "grid.train.nonsense: unknown key"),
        (
            ("[1, 2]", "[1]\n[[include]]\ntrain.seed = 9\nmodel = 5"),
            (),
            "sweep.toml: include[0].model: ",
        ),
        (
            ("[1, 2]", '[1]\ntrain.optimizer = [{ kind = "lamb", weight_decay = -1.0 }]'),
            (),
            "sweep.toml: grid.train.optimizer.weight_decay: ",
        ),
        (
            ("train.steps = 60", "train.global_batch_size = 6"),
            (),
            "sweep.toml: fixed.train.global_batch_size: with 4 ranks: 6 sequences",
        ),
        # Set by others, whether the sweep sets it too or not.
        (("train.steps = 60", "train.steps = 6"), ("train.steps=0",), "command line: train.steps:"),
        (('"run.toml"', '"bad.toml"'), (), "bad.toml: train.log_every: must be"),
    ],
)
def test_problems_name_the_place_in_the_sweep_file(
    slurm: FakeSlurm, change: tuple[str, str], arguments: tuple[str, ...], expected: str
) -> None:
    Path("bad.toml").write_text(f"{RUN_FILE}log_every = 0\n")
    with pytest.raises(ConfigError) as caught:
        command(GRID.replace(*change), *arguments)
    assert [line for line in caught.value.problems if expected in line]
    if arguments == () and "bad" not in change[1]:
        assert all(line.startswith("sweep.toml: ") for line in caught.value.problems)
    del slurm


def test_problems_name_the_stage(slurm: FakeSlurm) -> None:
    with pytest.raises(ConfigError) as caught:
        command(CHAINED.replace("[1, 2]", "[1, -2]"))
    assert "sweep.toml: stages.plain: grid.train.seed: " in caught.value.problems[0]
    del slurm


def test_the_same_command_again_submits_only_what_is_missing(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.set(sbatch_left=2)
    with pytest.raises(MpotrainError, match="QOSMaxSubmitJobPerUserLimit"):
        command(GRID)
    assert "2 of 4 runs are in the queue" in capsys.readouterr().out
    assert len(list(Path("runs/sweep").iterdir())) == 2
    slurm.set(sbatch_left=-1)
    slurm.update("500", state="COMPLETED")
    end(Path("runs/sweep/lr-0.001-seed-1"))
    assert command(GRID) == 0
    out = capsys.readouterr().out
    assert "lr-0.001-seed-1: done, skipped" in out
    assert "lr-0.001-seed-2: queued, skipped" in out
    assert "2 of 4 runs submitted" in out
    # A run that has failed is gone on with.
    slurm.update("501", state="FAILED")
    (Path("runs/sweep/lr-0.001-seed-2") / "outcome.json").write_text('{"outcome": "failed"}')
    assert command(GRID) == 0
    assert "lr-0.001-seed-2: job 504, goes on (failed before)" in capsys.readouterr().out


def test_a_silent_queue_is_no_leave_to_submit_twice(slurm: FakeSlurm) -> None:
    command(GRID)
    slurm.set(trouble={"squeue": "Unable to contact slurm controller"})
    with pytest.raises(MpotrainError, match="cannot tell whether 4 of 4 runs"):
        command(GRID)
    assert len(slurm.calls("sbatch")) == 4


def test_a_damaged_folder_is_no_leave_to_submit_twice(slurm: FakeSlurm) -> None:
    command(GRID)
    launch = Path("runs/sweep/lr-0.001-seed-1/launch")
    for name in ("submission.json", "lives.jsonl"):
        (launch / name).write_text("{")
    with pytest.raises(MpotrainError, match=r"1 of 4 runs still have a job.*mend or delete"):
        command(GRID)
    assert len(slurm.calls("sbatch")) == 4


def test_a_stop_file_is_seen_before_anything_is_submitted(slurm: FakeSlurm) -> None:
    Path("runs/sweep/lr-0.0003-seed-2/launch").mkdir(parents=True)
    Path("runs/sweep/lr-0.0003-seed-2/stop").touch()
    with pytest.raises(MpotrainError, match="the stop file is in 1 of 4 run folders"):
        command(GRID)
    assert slurm.calls("sbatch") == []


def test_an_array_is_one_submission(slurm: FakeSlurm) -> None:
    assert command(GRID, "--array", "--max-running", "3") == 0
    (call,) = slurm.calls("sbatch")
    assert "--array=0-3%3" in call
    assert f"--output={Path.cwd()}/runs/sweep/.sweep/%A_%a.log" in call
    index = Path(call[-1])
    assert call[-2] == str(ROOT / "slurm" / "array.sbatch")
    assert read_task(index, 2).folder == Path.cwd() / "runs/sweep/lr-0.0003-seed-1"
    for number, name in enumerate(["lr-0.001-seed-1", "lr-0.001-seed-2"]):
        run = Path("runs/sweep") / name
        assert load_config(run / "launch/run.toml").name == name
        assert read_run(run).job_ids == (f"500_{number}",)
        (event,) = LifeLog(run).records()
        assert (event["event"], event["job_id"]) == ("submitted", f"500_{number}")
    assert slurm.state["environments"][0]["MPOTRAIN_PYTHON"] == "/opt/python"


def test_a_refused_array_leaves_nothing_behind(slurm: FakeSlurm) -> None:
    slurm.set(sbatch_left=0)
    with pytest.raises(MpotrainError, match="QOSMax"):
        command(GRID, "--array")
    assert [path for path in Path("runs").rglob("*") if path.is_file()] == []


def test_a_folder_that_takes_no_record_leaves_the_others_theirs(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: LaunchFolder, submission: Any, life: int) -> None:
        if submission["job_id"] == "500_0":
            raise StorageError(str(self.path), "no space left on device")
        write(self, submission, life)

    write = LaunchFolder.record
    monkeypatch.setattr(LaunchFolder, "record", full)
    assert command(GRID, "--array") == 0
    assert "job 500_0 is in the queue, but the run folder could not" in capsys.readouterr().err
    folders = sorted(Path("runs/sweep").glob("lr-*"))
    assert sorted(read_run(folder).job_ids for folder in folders) == [
        (), ("500_1",), ("500_2",), ("500_3",),
    ]  # fmt: skip
    del slurm


def test_an_array_is_gone_on_with(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    command(GRID, "--array")
    slurm.update("500_1", state="TIMEOUT")
    assert command(GRID, "--array") == 0
    assert "--array=0-0" in slurm.calls("sbatch")[1]
    assert "lr-0.001-seed-2: job 501_0" in capsys.readouterr().out


def dependencies(slurm: FakeSlurm) -> dict[str, str]:
    return {
        job["name"]: job["dependency"] for job in slurm.state["jobs"] if job["state"] == "PENDING"
    }


def test_dependencies_of_jobs(slurm: FakeSlurm) -> None:
    assert command(CHAINED) == 0
    found = dependencies(slurm)
    assert found["seed-1"] == found["seed-2"] == "(null)"
    assert found["seed-1_seed-5"] == found["seed-1_seed-6"] == "afterok:500"
    assert found["seed-2_seed-6"] == "afterok:501"
    assert found["report"] == "afterok:500:501"
    assert "--kill-on-invalid-dep=yes" in slurm.calls("sbatch")[-1]
    # One parent is done, the other one runs: only that is waited for.
    for job_id in ("502", "503", "504", "505", "506"):
        slurm.update(job_id, state="CANCELLED")
    slurm.update("500", state="COMPLETED")
    slurm.update("501", state="RUNNING")
    end(Path("runs/sweep/plain/seed-1"))
    assert command(CHAINED) == 0
    found = dependencies(slurm)
    assert found["seed-1_seed-5"] == "(null)"
    assert found["seed-2_seed-5"] == found["report"] == "afterok:501"


def test_dependencies_of_arrays(slurm: FakeSlurm) -> None:
    assert command(CHAINED, "--array") == 0
    arrays = [call for call in slurm.calls("sbatch") if any(a.startswith("--array") for a in call)]
    assert len(arrays) == 2  # `plain` and `report`: points of `tuned` wait for different runs
    found = dependencies(slurm)
    assert found["seed-1_seed-5"] == "afterok:500_0"
    assert found["seed-2_seed-5"] == "afterok:500_1"
    assert found["sweep-report"] == "afterok:500_0:500_1"


def test_more_runs_than_an_array_can_have(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.sweep_submit.MAX_ARRAY", 3)
    with pytest.raises(ConfigError, match="4 runs to submit, but an array can have 3"):
        command(GRID, "--array")
    with pytest.raises(ConfigError, match="works with --array alone"):
        command(GRID, "--max-running", "2")
    assert slurm.calls("sbatch") == []


def test_an_array_task_becomes_the_supervisor_of_its_run(tmp_path: Path) -> None:
    """The process keeps its id, so that SLURM's signals reach the supervisor."""
    folders = [tmp_path / name for name in ("first", "second run")]
    write_index(tmp_path / "index.json", [ArrayTask(f, "tune") for f in folders])
    package = tmp_path / "package"
    for name, content in {
        "sitecustomize.py": "import launcher; launcher.__path__.insert(0, __file__[:-16] + 'fake')",
        "fake/__main__.py": "import os, sys; print(os.getpid(), *sys.argv[1:], sep='\\n')",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    environment = {
        **os.environ,
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "1",
        "PYTHONPATH": f"{package}{os.pathsep}{ROOT}",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "launcher.array_task", str(tmp_path / "index.json")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        out, errors = process.communicate(timeout=180)
    log = (folders[1] / "logs" / "70_1.log").read_text()
    launch = folders[1] / "launch"
    assert log.splitlines() == [
        str(process.pid), "batch", f"{launch}/run.toml", f"--cluster={launch}/cluster.toml",
        "--task=tune",
    ], errors  # fmt: skip
    assert out == b""


@pytest.mark.parametrize(
    "content", ["", "[]", '{"tasks": [1]}', '{"tasks": [{"folder": "x", "task": "rm"}]}']
)
def test_a_damaged_index_is_named(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    index = tmp_path / "index.json"
    index.write_text(content)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(SystemExit) as caught:
        array_task.main([str(index)])
    assert caught.value.code == 2
    assert "index.json" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(SystemExit):
        array_task.main([str(index)])
    assert "--array" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.toml")), ids=str)
def test_the_examples_can_be_expanded_and_loaded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    from launcher.plan_check import load_run

    points = expand(load_sweep(path))
    assert len(points) > 1
    for point in points:
        run = load_run(point.run_file, point.task, point.overrides)
        assert run.problems() == []
        assert json.dumps(point.overrides)


def test_every_example_can_be_submitted_by_its_documented_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder: what the checkout holds beside its files must not matter."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.sweep_submit.has_slurm", lambda: False)
    text = (ROOT / "docs" / "many-runs.md").read_text()
    commands = re.findall(r"^python -m launcher (sweep configs/sweeps/.*)$", text, re.MULTILINE)
    sweeps = {str(path.relative_to(ROOT)) for path in (ROOT / "configs/sweeps").glob("*.toml")}
    assert {line.split()[1] for line in commands} == sweeps
    for line in commands:
        assert cli.main([*line.split(), "--dry-run"]) == 0, line
        assert "runs would be submitted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("folder=runs/elsewhere", "folder: every run of a sweep has its own"),
        ("name=all", "name: every run of a sweep has its own"),
        ("train.seed=5", "the sweep varies train.seed"),
        ("train.schedule={kind='constant', lr=1.0}", "the sweep varies train.schedule.lr"),
    ],
)
def test_settings_that_would_make_runs_equal(slurm: FakeSlurm, setting: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        command(GRID, setting)
    assert slurm.calls("sbatch") == []
    assert command(GRID, "train.log_every=7") == 0
