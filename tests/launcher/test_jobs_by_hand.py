"""Jobs that a person submits with sbatch alone: their size, and where their successors write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from job_stand_in import StandIn
from launch_fakes import ROOT
from one_life import events, live

from launcher.cluster import ClusterConfig
from launcher.job_size import cluster_of, job_size, sized
from launcher.launch_error import LaunchError
from launcher.slurm_commands import sbatch_options


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
    cluster = cluster_of(job_size({"SLURM_JOB_NUM_NODES": "2", **variables}))
    assert (cluster.nodes, cluster.local_ranks) == (2, ranks)


def test_unequal_nodes_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"3,2: every node must have as many .*ntasks-per-node"):
        job_size({"SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "3,2"})


@pytest.mark.parametrize(
    ("variables", "cpus"),
    [
        # --gres=gpu:8 --cpus-per-task=96: SLURM counts one task.
        ({"SLURM_CPUS_PER_TASK": "96", "SLURM_JOB_CPUS_PER_NODE": "96(x2)"}, 12),
        ({"SLURM_JOB_CPUS_PER_NODE": "96,64"}, 8),  # --exclusive
        ({"SLURM_JOB_CPUS_PER_NODE": "15(x2)"}, 1),
        # Here SLURM itself has counted them for every rank.
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "3"}, 3),
    ],
)
def test_ranks_of_gpus_share_the_cpus_of_the_job(variables: dict[str, str], cpus: int) -> None:
    cluster = cluster_of(job_size({"SLURM_GPUS_ON_NODE": "8", **variables}))
    assert (cluster.local_ranks, cluster.cpus_per_rank) == (8, cpus)


def test_a_job_of_fewer_cpus_than_gpus_is_refused() -> None:
    """srun would refuse its step, and three lives would be spent on that."""
    size = job_size({"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "2(x2)"})
    with pytest.raises(LaunchError, match=r"2 CPUs on each node for 8 ranks.*--cpus-per-task=N"):
        cluster_of(size)


FILES = {
    "srun": ClusterConfig(ranks_per_node=4, cpus_per_rank=6, partition="long"),
    "gpus": ClusterConfig(gpus_per_node=4, cpus_per_rank=6, partition="long"),
    "torchrun": ClusterConfig(ranks_per_node=4, cpus_per_rank=6, launcher="torchrun"),
    "gpu agents": ClusterConfig(gpus_per_node=4, cpus_per_rank=6, launcher="deepspeed"),
}


def job_of(cluster: ClusterConfig, **variables: str) -> dict[str, str]:
    """Return the variables of a job submitted for a cluster, with others in place of some."""
    options = dict(
        option.removeprefix("--").split("=", 1)
        for option in sbatch_options(cluster, name="n", log="l", folder="f")
        if "=" in option
    )
    nodes = int(options["nodes"])
    cpus = int(options["ntasks-per-node"]) * int(options["cpus-per-task"])
    found = {
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_JOB_CPUS_PER_NODE": f"{cpus}(x{nodes})",
    }
    if "gres" in options:
        found["SLURM_GPUS_ON_NODE"] = options["gres"].removeprefix("gpu:")
    return {key: value for key, value in (found | variables).items() if value}


@pytest.mark.parametrize("kind", FILES)
def test_a_job_of_the_launcher_is_that_of_its_file(kind: str) -> None:
    cluster = FILES[kind]
    assert sized(cluster, job_size(job_of(cluster)), "c.toml") is cluster
    # --exclusive among its further options: all that the node has.
    whole = job_of(cluster, SLURM_JOB_CPUS_PER_NODE="96", SLURM_GPUS_ON_NODE="8")
    assert sized(cluster, job_size(whole), "c.toml") is cluster


@pytest.mark.parametrize(
    ("kind", "tasks", "cpus", "of_node", "gpus", "expected"),
    [
        # (ranks and CPUs of each, GPUs of a node), where the file says 4 ranks with 6 CPUs.
        ("srun", "8", "12", "96", "", (8, 12, 0)),
        ("srun", "8", "", "8", "", (8, 1, 0)),
        ("srun", "", "", "96", "", (4, 6, 0)),
        ("srun", "", "8", "8", "", (4, 2, 0)),
        ("srun", "8", "12", "96", "8", (8, 12, 8)),
        ("gpus", "8", "12", "96", "8", (8, 12, 8)),
        ("gpus", "", "96", "96", "8", (8, 6, 8)),
        ("gpus", "2", "3", "6", "2", (2, 3, 2)),
        ("torchrun", "1", "24", "24", "", (4, 6, 0)),
        ("torchrun", "1", "8", "8", "", (4, 2, 0)),
        ("torchrun", "4", "6", "24", "", (4, 6, 0)),
        ("torchrun", "", "", "96", "", (4, 6, 0)),
        ("gpu agents", "1", "96", "96", "8", (4, 6, 4)),
    ],
)
def test_options_of_the_job_win_over_the_file(
    kind: str, tasks: str, cpus: str, of_node: str, gpus: str, expected: tuple[int, ...]
) -> None:
    job = job_of(
        FILES[kind],
        SLURM_JOB_NUM_NODES="2",
        SLURM_NTASKS_PER_NODE=tasks,
        SLURM_CPUS_PER_TASK=cpus,
        SLURM_JOB_CPUS_PER_NODE=f"{of_node}(x2)",
        SLURM_GPUS_ON_NODE=gpus,
    )
    found = sized(FILES[kind], job_size(job), "c.toml")
    assert (found.local_ranks, found.cpus_per_rank, found.gpus_per_node) == expected
    ranks, rank_cpus, node_gpus = expected
    assert found == replace(
        FILES[kind],
        nodes=2,
        ranks_per_node=FILES[kind].ranks_per_node if kind == "gpu agents" else ranks,
        cpus_per_rank=rank_cpus,
        gpus_per_node=node_gpus,
    )
    assert found.problems() == []
    # The job that takes its place comes to the same size, and so does the one after that.
    assert sized(FILES[kind], job_size(job_of(found)), "c.toml") == found


@pytest.mark.parametrize(
    ("kind", "changed", "told"),
    [
        ("torchrun", {"SLURM_NTASKS_PER_NODE": "8"}, "8 tasks on each node, but torchrun starts 4"),
        ("gpu agents", {"SLURM_GPUS_ON_NODE": "2"}, "2 GPUs on each node for 4 ranks"),
        ("gpus", {"SLURM_NTASKS_PER_NODE": "8"}, "4 GPUs on each node for 8 ranks"),
        # Nothing else differs.
        ("gpus", {"SLURM_JOB_NUM_NODES": "", "SLURM_GPUS_ON_NODE": "2"}, "2 GPUs on each node"),
        ("gpus", {"SLURM_JOB_NUM_NODES": "", "SLURM_GPUS_ON_NODE": ""}, "0 GPUs on each node"),
        ("gpu agents", {"SLURM_GPUS_ON_NODE": ""}, "0 GPUs on each node for 4 ranks"),
        (
            "srun",
            {"SLURM_NTASKS_PER_NODE": "", "SLURM_JOB_CPUS_PER_NODE": "2"},
            "2 CPUs on each node for 4 ranks",
        ),
    ],
)
def test_a_job_that_cannot_be_that_of_the_file_is_refused(
    kind: str, changed: dict[str, str], told: str
) -> None:
    job = job_of(FILES[kind], **({"SLURM_JOB_NUM_NODES": "2"} | changed))
    with pytest.raises(LaunchError, match=rf"^c.toml: \w+: the job has {told}"):
        sized(FILES[kind], job_size(job), "c.toml")


BATCH = """
import json, sys
from pathlib import Path
from launcher import batch
class Shown:
    def __init__(self, run, *_):
        self.job = run.job
    def run(self):
        print(json.dumps([self.job.cluster.nodes, *self.job.command("100", ()).argv]))
        return 0
batch.Supervisor = Shown
sys.exit(batch.run_batch(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_a_job_by_hand_with_a_cluster_file(slurm: StandIn, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f"extends = ['{ROOT}/configs/runs/demo-moe.toml']\n")
    (tmp_path / "c.toml").write_text("ranks_per_node = 4\npartition = 'long'\n")
    size = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "3"}
    done = subprocess.run(
        [sys.executable, "-c", BATCH, "run.toml", "c.toml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **size},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    told, shown = done.stdout.splitlines()
    assert "the job has 2 nodes x 8 ranks with 3 CPUs each" in told
    assert "not c.toml, which says 1 nodes x 4 ranks with 1 CPUs" in told
    nodes, *command = json.loads(shown)
    assert nodes == 2
    assert {"--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=3", "--partition=long"} <= set(
        command
    )


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
