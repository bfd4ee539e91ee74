"""Jobs that a person submits with sbatch alone: their size, and where their successors write."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_stand_in import StandIn
from one_life import events, live

from launcher.allocation import cluster_of
from launcher.launch_error import LaunchError


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_NTASKS": "16"}, 8),
        ({"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}, 4),
        ({"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        # What SLURM says of a job that named no tasks.
        ({"SLURM_TASKS_PER_NODE": "64(x2)"}, 1),
    ],
)
def test_ranks_of_a_node(variables: dict[str, str], ranks: int) -> None:
    cluster = cluster_of({"SLURM_JOB_NUM_NODES": "2", **variables})
    assert (cluster.nodes, cluster.local_ranks) == (2, ranks)


def test_unequal_nodes_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"3,2: every node must have as many .*ntasks-per-node"):
        cluster_of({"SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "3,2"})


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def test_a_successor_finds_the_folder_of_its_log(slurm: StandIn) -> None:
    """SLURM makes no folder, and fails a job whose log it cannot open before its script begins."""
    assert not (slurm.run / "logs").exists()
    slurm.write("dead", "n2")
    slurm.ranks("save(5); sys.exit(1)")
    assert live(slurm) == 85
    assert events(slurm)[-1] == "resubmitted"
    (option,) = [text for text in slurm.calls("sbatch")[-1] if text.startswith("--output=")]
    assert Path(option.removeprefix("--output=")).parent.is_dir()
