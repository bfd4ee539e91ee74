"""Runs on the lab for tests, and the curve of one that nobody disturbs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_process import prepare_markov
from slurm.lab_fixture import SlurmLab
from slurm.scenario import STEPS, Make, Point, Scenario


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tokens of a Markov chain."""
    return prepare_markov(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def make(fresh_lab: SlurmLab, tmp_path: Path, data: Path) -> Iterator[Make]:
    """Make a run; it is taken out of the queue behind the test."""
    made: list[Scenario] = []

    def build(*cluster: str, **more: Any) -> Scenario:
        made.append(Scenario(fresh_lab, tmp_path / f"scenario-{len(made)}", data, *cluster, **more))
        return made[-1]

    yield build
    for scenario in made:
        scenario.launcher("cancel", "--now", str(scenario.folder), check=False)


@pytest.fixture(scope="session")
def undisturbed(lab: SlurmLab, tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Point]:
    """The curve of two nodes with two ranks each that nobody disturbs, and what people see."""
    scenario = Scenario(lab, tmp_path_factory.mktemp("undisturbed"), data)
    job_id = scenario.submit()
    scenario.wait_for_step(5)
    shown = scenario.launcher("status", str(scenario.folder)).stdout
    assert job_id in shown
    assert "RUNNING" in shown.upper()
    scenario.wait_until_done()
    (checked,) = scenario.events("preflight")
    assert checked["ok"], checked
    (started,) = scenario.events("started")
    assert len(started["nodes"]) == 2
    shown = scenario.launcher("status", str(scenario.folder)).stdout
    assert f"{STEPS}" in shown
    assert "done" in shown
    return scenario.curve()
