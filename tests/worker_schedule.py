"""How pytest-xdist shares the tests out among its workers (`pytest -n 2`)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from xdist.scheduler import LoadFileScheduling

LAB = "tests/slurm/"
FIRST = (LAB, "tests/faults/", "tests/launcher/", "tests/resume/", "tests/distributed/")
"""Folders with the longest tests, of which many wait more than they compute."""


class OneLabScheduling(LoadFileScheduling):
    """Give every file to one worker, which makes its module's fixtures, and the lab to one of them.

    There is one SLURM lab on a machine, so all files that use it are one piece of work.
    """

    def _split_scope(self, nodeid: str) -> str:
        return LAB if nodeid.startswith(LAB) else str(super()._split_scope(nodeid))


def sort_for_workers(items: list[pytest.Item]) -> None:
    """Put long tests first and short ones last, so that all workers end at about the same time.

    Args:
        items: sorted in place; the order inside a folder stays.
    """
    items.sort(key=lambda item: _place(item.nodeid, FIRST))


def _place(nodeid: str, folders: Sequence[str]) -> int:
    return next((n for n, folder in enumerate(folders) if nodeid.startswith(folder)), len(folders))
