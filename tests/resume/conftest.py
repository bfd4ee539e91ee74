"""Data and the uninterrupted reference run that the tests of this folder share."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from run_process import prepare_markov, train, write_run


@pytest.fixture(scope="session")
def markov_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tokens of a Markov chain."""
    return prepare_markov(tmp_path_factory.mktemp("markov") / "data")


@pytest.fixture(scope="session")
def straight_run(markov_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of 20 uninterrupted steps on the local engine."""
    folder = tmp_path_factory.mktemp("straight")
    train(write_run(folder, markov_data))
    return folder / "run"


@pytest.fixture
def new_run(markov_data: Path, tmp_path: Path) -> Callable[[], Path]:
    """Write a run file with a run folder of its own, another one at every call."""
    numbers = itertools.count()
    return lambda: write_run(tmp_path / f"run-{next(numbers)}", markov_data)
