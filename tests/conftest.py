"""Fixtures for the whole tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed.pool import RankPool


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
        def call(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
            return rank_pool.run(size, function, *args, timeout=timeout)

        return call

    return for_world


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that rewrites golden files."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden and schema")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten before they are compared."""
    return bool(request.config.getoption("--update-golden"))
