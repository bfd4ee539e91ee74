"""The batch scripts: short, sound and free of anything that would end a job by itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_fakes import ROOT, make_fake

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def test_there_are_scripts() -> None:
    names = {script.stem for script in SCRIPTS}
    assert {"train", "prepare_data", "evaluate"} <= names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_shellcheck(script: os.PathLike[str]) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI has no shellcheck")
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [shellcheck, "--severity=style", str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_bash_reads_it(script: os.PathLike[str]) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_is_short_and_does_not_look_for_itself(script: os.PathLike[str]) -> None:
    text = (ROOT / "slurm" / script).read_text()
    assert len(text.splitlines()) < 50
    # SLURM runs a copy in a folder of its own.
    assert "$0" not in text
    assert "BASH_SOURCE" not in text
    assert "eval " not in text.replace("mpotrain eval", "")


def test_train_script_becomes_the_supervisor() -> None:
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    last = [line for line in text.splitlines() if line.strip()][-1]
    assert last.startswith("exec ")
    assert "#SBATCH --signal=B:USR1@" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.parametrize("python", ["bare", "missing"])
def test_wrong_interpreter_is_named(script: Path, python: str, tmp_path: Path) -> None:
    """Without the check the log would say `No module named launcher`, and nobody what to do."""
    bare = tmp_path / "bin" / "bare"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    bare.chmod(0o755)
    started = make_fake(tmp_path / "bin", "srun")
    done = subprocess.run(
        ["bash", str(script), "run.toml"],
        cwd=tmp_path,
        env={
            "PATH": f"{bare.parent}{os.pathsep}{os.environ['PATH']}",
            "MPOTRAIN_PYTHON": str(bare.with_name(python)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: mpotrain is not installed for {bare.with_name(python)} on ")
    assert "MPOTRAIN_PYTHON" in said
    assert started.calls() == []


@pytest.mark.parametrize("name", ["train", "array"])
def test_warning_that_comes_early_does_not_kill_the_script(name: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && kill -USR1 $PPID\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / f"{name}.sbatch"), "run.toml"],
        env={"PATH": os.environ["PATH"], "MPOTRAIN_PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("-m launcher")


LATER = {
    "first": ([], {}, ""),
    "restarted": ([], {"SLURM_RESTART_COUNT": "30"}, "7"),
    "continued": (["--continues=6"], {}, "7"),
    # The number of one task of an array is that of the array: all tasks would be requeued.
    "task": (
        [],
        {"SLURM_RESTART_COUNT": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"},
        "7_2",
    ),
}
"""Arguments and variables of a life, and the job that goes elsewhere."""


@pytest.mark.parametrize("name", ["train", "array"])
@pytest.mark.parametrize("life", LATER)
def test_later_life_waits_for_a_late_mount_and_then_goes_elsewhere(
    name: str, life: str, tmp_path: Path
) -> None:
    bin_folder = tmp_path / "bin"
    naps = make_fake(bin_folder, "sleep")
    control = make_fake(bin_folder, "scontrol")
    arguments, variables, job = LATER[life]
    command = ["bash", str(ROOT / "slurm" / f"{name}.sbatch"), "run.toml", *arguments]
    environment = {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "MPOTRAIN_PYTHON": str(tmp_path / "python"),
        "SLURM_JOB_ID": "7",
        **variables,
    }
    for start in range(1, 5):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "error: mpotrain is not installed" in done.stderr
        assert len(naps.calls()) == (11 * start if job else 0)
        # A mount that never comes does not keep nodes busy for ever.
        asked = [call["argv"] for call in control.calls()]
        assert asked == [["requeue", job]] * (min(start, 3) if job else 0)
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0
    assert not list(tmp_path.glob(".mpotrain*"))
