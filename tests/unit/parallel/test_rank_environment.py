from __future__ import annotations

import pytest

from mpotrain.errors import ParallelError
from mpotrain.parallel.environment import Ranks, export_environment, resolve_environment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


def without(environ: dict[str, str], *keys: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key not in keys}


def test_alone_without_any_launcher() -> None:
    alone = Ranks(0, 1, 0, 1, 0, None, None, "single")
    assert resolve_environment({}) == alone
    # A shell inside an allocation, and an address exported for later, make no world.
    assert resolve_environment({"SLURM_JOB_ID": "7", "MASTER_ADDR": "node0"}) == alone


def test_torchrun() -> None:
    assert resolve_environment(TORCHRUN) == Ranks(5, 8, 1, 4, 1, "node0", 29500, "launcher")


def test_deepspeed_launcher_names_its_local_size_otherwise() -> None:
    environ = without(TORCHRUN, "LOCAL_WORLD_SIZE", "GROUP_RANK") | {"LOCAL_SIZE": "2"}
    ranks = resolve_environment(environ)
    assert (ranks.local_size, ranks.node_rank) == (2, 2)


def test_single_process_of_a_launcher_needs_no_address() -> None:
    ranks = resolve_environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert (ranks.size, ranks.master_addr, ranks.launcher) == (1, None, "launcher")


def test_srun() -> None:
    ranks = resolve_environment(SRUN)
    assert ranks == Ranks(5, 8, 1, 4, 1, "10.0.0.1", ranks.master_port, "slurm")
    assert ranks.master_port is not None
    assert 20_000 <= ranks.master_port < 32_000
    chosen = resolve_environment(SRUN | {"MASTER_ADDR": "node7", "MASTER_PORT": "4000"})
    assert (chosen.master_addr, chosen.master_port) == ("node7", 4000)


def test_requeued_job_meets_on_another_port() -> None:
    ports = {
        resolve_environment(SRUN | {"SLURM_RESTART_COUNT": str(life)}).master_port
        for life in range(5)
    }
    assert len(ports) == 5
    same = [resolve_environment(SRUN | {"SLURM_PROCID": str(rank)}) for rank in range(8)]
    assert len({ranks.master_port for ranks in same}) == 1


@pytest.mark.parametrize(("text", "sizes"), [("2(x2),1", [2, 2, 1]), ("3,2", [3, 2]), ("5", [5])])
def test_tasks_per_node(text: str, sizes: list[int]) -> None:
    environ = without(SRUN, "SLURM_STEP_TASKS_PER_NODE") | {
        "SLURM_TASKS_PER_NODE": text,
        "SLURM_NTASKS": "5",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for node, size in enumerate(sizes):
        assert resolve_environment(environ | {"SLURM_NODEID": str(node)}).local_size == size


def test_torchrun_under_srun_wins() -> None:
    per_node = SRUN | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert resolve_environment(per_node | TORCHRUN).launcher == "launcher"


@pytest.mark.parametrize("key", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launcher_is_refused_by_name(key: str) -> None:
    with pytest.raises(ParallelError, match=rf"set, but not {key}\b"):
        resolve_environment(without(TORCHRUN, key))


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (TORCHRUN | {"RANK": "8"}, "RANK=8 does not lie in"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 does not lie in"),
        (TORCHRUN | {"RANK": "five"}, "RANK='five': not a whole number"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8 does not lie in"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS=4, SLURM_NTASKS=8 contradict"),
        (without(SRUN, "SLURM_LOCALID"), "not SLURM_LOCALID"),
        (
            without(SRUN, "SLURM_LAUNCH_NODE_IPADDR"),
            r"not MASTER_ADDR \(or SLURM_LAUNCH_NODE_IPADDR\)",
        ),
        (without(SRUN, "SLURM_JOB_ID"), r"not MASTER_PORT \(or SLURM_JOB_ID\)"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "not a list such as"),
        (
            without(SRUN, "SLURM_STEP_ID", "SLURM_LAUNCH_NODE_IPADDR"),
            "it is the batch script itself",
        ),
        (
            SRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "8 processes would each run alone",
        ),
    ],
)
def test_contradictions_are_refused_by_name(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ParallelError, match=named):
        resolve_environment(environ)


def test_export_spells_the_rank_for_every_library() -> None:
    environ: dict[str, str] = {}
    export_environment(resolve_environment(SRUN), environ, device_index=0)
    assert environ["RANK"] == "5"
    assert environ["WORLD_SIZE"] == "8"
    assert environ["LOCAL_RANK"] == "0"
    assert environ["LOCAL_SIZE"] == "4"
    assert environ["CROSS_RANK"] == "1"
    assert environ["CROSS_SIZE"] == "2"
    assert environ["MASTER_ADDR"] == "10.0.0.1"
    assert resolve_environment(environ).rank == 5
