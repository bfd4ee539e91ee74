"""Fixtures for the whole tree."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from distributed.pool import TIMEOUT, RankPool

# How long an example takes says nothing on a machine that does other things as well.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Workers for multi-process tests; none is started before a test asks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def run_ranks(rank_pool: RankPool) -> Callable[[int], Callable[..., list[Any]]]:
    """Run a function on several gloo ranks.

    `run_ranks(2)(function, *args, timeout=60)` calls `function(world, *args)` on both ranks and
    returns their results in rank order. The function and its arguments are pickled, so it lives
    at the top of a test module. What a rank raises is raised here with its traceback and rank.
    """

    def for_world(size: int) -> Callable[..., list[Any]]:
        def call(function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
            return rank_pool.run(size, function, *args, timeout=timeout)

        return call

    return for_world


def pytest_configure() -> None:
    """Let children hear SIGHUP, also where the tests themselves run under `nohup`."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # Unlike an ignored signal, one with a handler has its default action in children.
        signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Choose how files are shared out where there are several workers (`pytest -n 2`)."""
    from worker_schedule import OneLabScheduling

    config.option.loadscopereorder = False
    return OneLabScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests on workers; a single process runs them in the order of the folders."""
    if hasattr(config, "workerinput"):
        from worker_schedule import sort_for_workers

        sort_for_workers(items)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that rewrites golden files."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden and schema")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten before they are compared."""
    return bool(request.config.getoption("--update-golden"))
