"""What a run needs, held against what its cluster file gives: GPUs, packages, folders."""

import json
from pathlib import Path

import pytest
from launch_fakes import CLUSTER_FILE
from submission_desk import Desk

from launcher.plan_check import ENGINE_PACKAGES
from mpotrain.errors import EXIT_BAD_INPUT


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch)


def test_gpus_of_run_and_cluster(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.slurm("--dry-run", "engine.device=cuda") == EXIT_BAD_INPUT
    assert 'engine.device: "cuda", but the cluster file asks for no' in capsys.readouterr().err
    cluster = desk.folder / "cluster.toml"
    cluster.write_text(CLUSTER_FILE + "extra = ['--gpus-per-task=1']\n")
    assert desk.slurm("--dry-run", "engine.device=cuda") == 0
    cluster.write_text(CLUSTER_FILE + "gpus_per_node = 2\n")
    capsys.readouterr()
    assert desk.slurm("--dry-run", "engine.device=cuda") == 0
    assert "engine.device" not in capsys.readouterr().out
    assert desk.slurm("--dry-run") == 0
    assert 'note: engine.device: "cpu", but' in capsys.readouterr().out


def test_engine_that_is_not_installed(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINE_PACKAGES, "deepspeed", "no_such_package")
    zero = "engine={kind='deepspeed', zero_stage=1, device='cpu'}"
    assert desk.slurm("--dry-run", zero) == 0  # the cluster file names an interpreter of its own
    cluster = desk.folder / "cluster.toml"
    cluster.write_text(CLUSTER_FILE.replace('python = "/opt/python"\n', ""))
    assert desk.slurm("--dry-run", zero) == EXIT_BAD_INPUT
    assert 'pip install "mpotrain[deepspeed]"' in capsys.readouterr().err
    cluster.write_text(cluster.read_text() + 'modules = ["torch"]\n')
    assert desk.slurm("--dry-run", zero) == 0
    cluster.write_text(CLUSTER_FILE.replace("/opt/python", "") + "[environment]\nPYTHONPATH = '/w'")
    cluster.write_text(cluster.read_text().replace('python = ""\n', ""))
    assert desk.slurm("--dry-run", zero) == 0


def test_folders_that_ranks_would_not_see_are_told(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    path = desk.folder / "cluster.toml"
    text = path.read_text()
    for mounts, told in (([], True), ([f"/data:{desk.folder}:rw"], False), (["/data"], True)):
        container = f'container = {{ kind = "pyxis", image = "i", mounts = {json.dumps(mounts)} }}'
        path.write_text(f"{container}\n{text}")
        assert desk.slurm("--dry-run") == 0
        assert ("is in none of container.mounts" in capsys.readouterr().out) is told
