"""A sweep file, and what tests of sweeps do with such files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from launch_fakes import CLUSTER_FILE, RUN_FILE
from slurm_commands_fake import FakeSlurm

from launcher import sweep
from launcher.sweep_file import load_sweep
from launcher.sweep_points import Point, expand
from mpotrain.config import load_config
from mpotrain.errors import ConfigError

GRID = """\
run = "run.toml"
folder = "runs/sweep"
name = "lr-{train.schedule.lr}-seed-{train.seed}"
[fixed]
train.steps = 60
[grid]
train.schedule.lr = [1e-3, 3e-4]
train.seed = [1, 2]
"""


STAGES = """\
folder = "runs/sweep"
[stages.tuned]
run = "run.toml"
for_each = "plain"
[stages.tuned.grid]
data.seed = [5, 6]
[stages.tuned.fixed]
tokenizer_of = "{parent.folder}"
[stages.plain]
run = "run.toml"
[stages.plain.grid]
train.seed = [1, 2]
[stages.report]
run = "run.toml"
after = "plain"
"""
CHAINED = STAGES.replace('tokenizer_of = "{parent.folder}"', "train.steps = 50")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    (tmp_path / "run.toml").write_text(RUN_FILE)
    (tmp_path / "cluster.toml").write_text(CLUSTER_FILE)
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "bin", monkeypatch)


def points_of(folder: Path, text: str) -> list[Point]:
    (folder / "run.toml").write_text(RUN_FILE)
    (folder / "sweep.toml").write_text(text)
    return expand(load_sweep(folder / "sweep.toml"))


def problems_of(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        points_of(folder, text)
    return "\n".join(caught.value.problems)


def end(folder: Path) -> None:
    """Let a submitted run have come to its last step."""
    steps = load_config(folder / "launch/run.toml").train.steps
    (folder / "outcome.json").write_text(json.dumps({"outcome": "done", "step": steps}))


def command(text: str, *arguments: str) -> int:
    Path("sweep.toml").write_text(text)
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    return sweep.main(parser.parse_args(["sweep.toml", *arguments, "--cluster", "cluster.toml"]))
