"""Who should be there, what they are called, and who has answered."""

from __future__ import annotations

import pytest

from mpotrain.errors import ParallelError
from mpotrain.parallel.environment import Ranks, resolve_environment
from mpotrain.preflight.hostlist import expand_hostlist, step_nodes
from mpotrain.preflight.layout import (
    Presence,
    expected_names,
    node_name,
    num_expected_nodes,
    roll_call,
    world_name,
    world_of_nodes,
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("login", ("login",)),
        ("node[1-3]", ("node1", "node2", "node3")),
        ("gpu[01-03,07],login,a[9-11]-ib", "gpu01 gpu02 gpu03 gpu07 login a9-ib a10-ib a11-ib"),
        ("r[0-1]n[2-3]", ("r0n2", "r0n3", "r1n2", "r1n3")),
        ("node[1-", ()),
        ("node[a-b]", ()),
        ("node[1-999999999]", ()),
    ],
)
def test_lists_of_hosts(text: str, names: tuple[str, ...] | str) -> None:
    assert expand_hostlist(text) == (tuple(names.split()) if isinstance(names, str) else names)


def slurm(rank: int = 0, **more: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_NODEID": str(rank // 2),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURMD_NODENAME": f"gpu0{7 + rank // 2}",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "2900",
    } | more


def test_nodes_of_a_slurm_step() -> None:
    environ = slurm(3)
    ranks = resolve_environment(environ)
    assert num_expected_nodes(environ, ranks) == 2
    assert node_name(environ) == "gpu08"
    assert expected_names(environ, ranks, (), 2) == ["gpu07", "gpu08"]
    assert expected_names(environ, ranks, ("a", "b"), 2) == ["a", "b"]
    assert expected_names(environ, ranks, ("a",), 2) == ["gpu07", "gpu08"]
    assert expected_names(environ, ranks, (), 3)[2] == "node number 2"
    assert step_nodes({}) == ()


def test_nodes_of_torchrun_and_of_one_process() -> None:
    environ = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    ranks = resolve_environment(environ)
    assert num_expected_nodes(environ, ranks) == 2
    assert num_expected_nodes(environ | {"GROUP_WORLD_SIZE": "3"}, ranks) == 3
    assert expected_names(environ, ranks, (), 2) == ["node number 0", "node number 1"]
    assert num_expected_nodes({}, resolve_environment({})) == 1


def present(rank: int, node: int, name: str, local_size: int) -> Presence:
    return Presence(rank, node, name, local_size, f"start of {rank}")


def test_worlds_are_told_apart_without_a_message() -> None:
    names = {
        world_name(environ, resolve_environment(environ))
        for environ in (
            slurm(),
            slurm(SLURM_RESTART_COUNT="1"),
            slurm(SLURM_JOB_ID="8"),
        )
    }
    assert len(names) == 3
    both = [world_name(slurm(rank), resolve_environment(slurm(rank))) for rank in (0, 3)]
    assert both[0] == both[1]


def test_the_roll_is_called() -> None:
    here = [present(0, 0, "a", 2), present(1, 0, "a", 2), present(5, 2, "c", 2)]
    nodes = roll_call(here, 8, ["x", "b", "z", "d"])
    facts = [(node.number, node.name, node.num_ranks, node.met) for node in nodes]
    assert facts == [(0, "a", 2, 2), (1, "b", 2, 0), (2, "c", 2, 1), (3, "d", 2, 0)]


def test_nodes_that_share_a_name_are_told_apart() -> None:
    here = [present(0, 0, "vm", 1), present(1, 1, "vm", 1)]
    assert [node.name for node in roll_call(here, 2, ["q", "r"])] == ["vm.0", "vm.1"]


def test_nodes_started_one_by_one_form_a_world() -> None:
    own = {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NUM_NODES": "1"}
    environ = slurm(1, SLURM_NODEID="0", SLURMD_NODENAME="b", **own)
    alone = resolve_environment(environ)
    ranks = world_of_nodes(environ, alone, ("a", "b", "c"), "b")
    assert ranks == Ranks(3, 6, 1, 2, 1, "10.0.0.1", 2900, "per-node")
    assert num_expected_nodes(environ, ranks) == 3
    with pytest.raises(ParallelError, match="does not name this node, z"):
        world_of_nodes(environ, alone, ("a", "b"), "z")
    with pytest.raises(ParallelError, match="MASTER_ADDR"):
        world_of_nodes({}, alone, ("a", "b"), "b")
    with pytest.raises(ParallelError, match="4 ranks were started, 2 of them"):
        world_of_nodes(environ, resolve_environment(slurm(1)), ("a", "b"), "b")
