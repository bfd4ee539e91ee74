"""A run whose pre-flight finds a bad node goes on without that node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm.lab_fixture import SlurmLab
from slurm.scenario import RANKS, Make, full

SHORT = ("train.steps=40", "train.eval_every=20")


@pytest.fixture
def fill(fresh_lab: SlurmLab, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a temporary folder that on one node is a disk of 8 MiB."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    nodes: list[str] = []

    def play(node: str) -> Path:
        small = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=1777", "tmpfs", str(folder)]
        fresh_lab.exec(node, small)
        nodes.append(node)
        return folder

    yield play
    for node in nodes:
        fresh_lab.exec(node, ["umount", "--lazy", str(folder)], check=False)


@pytest.mark.parametrize("restart", ["requeue", pytest.param("resubmit", marks=full)])
def test_a_bad_node_is_named_and_left_out(
    make: Make, fill: Callable[[str], Path], restart: str
) -> None:
    # The first idle nodes get the job.
    folder = fill("node2")
    scenario = make(
        RANKS, f"environment = {{ TMPDIR = \"{folder}\" }}", "[lives]", f'restart = "{restart}"',
        overrides=SHORT,
    )  # fmt: skip
    job_id = scenario.submit()
    scenario.wait_until_done()
    bad, good = scenario.events("preflight")
    assert not bad["ok"]
    assert set(bad["bad_nodes"]) == {"node2"}
    assert "No space left on device" in bad["bad_nodes"]["node2"]
    assert good["ok"], good
    first, second = scenario.events("started")
    assert "node2" in first["nodes"]
    assert "node2" not in second["nodes"]
    assert len(second["nodes"]) == 2
    # The second life did not leave the node out by chance: SLURM knew.
    (event,) = scenario.events({"requeue": "requeued", "resubmit": "resubmitted"}[restart])
    assert event["exclude"] == ["node2"]
    assert scenario.lab.job(second["job_id"])["ExcNodeList"] == "node2"
    assert (second["job_id"] == job_id) == (restart == "requeue")
    # No rank was started beside the bad node: steps of the first life do not exist.
    points = scenario.curve()
    assert [step for step, _, _ in points] == list(range(1, 41))
    assert scenario.events("ended")[0]["outcome"] is None
    shown = scenario.launcher("status", str(scenario.folder)).stdout
    assert "done" in shown
