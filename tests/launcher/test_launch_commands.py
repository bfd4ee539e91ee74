"""Exact commands of every shipped cluster file with every launcher, and what must hold for all.

`pytest --update-golden` rewrites the snapshots.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from launch_fakes import ROOT

from launcher.cluster import ClusterConfig, LivesConfig, load_cluster
from launcher.commands import (
    Command,
    Endpoint,
    deepspeed_command,
    deepspeed_over_ssh_command,
    local_command,
    module_argv,
    rank_environment,
    torchrun_command,
)
from launcher.containers import ApptainerContainer
from launcher.job import JobFacts, master_port
from launcher.slurm_commands import sbatch_command, sbatch_options, srun_command, step_command
from launcher.slurm_names import job_name, log_pattern

FILES = sorted((ROOT / "configs" / "clusters").glob("*.toml"))
FLAVOURS = ("srun", "torchrun", "deepspeed")
GOLDEN = Path(__file__).parent.parent / "golden" / "launch"
RUN = "/shared/runs/small/launch/run.toml"


def cluster_of(path: Path, flavour: str) -> ClusterConfig:
    restarts = [] if flavour == "torchrun" else ["lives.worker_restarts=0"]
    cluster = load_cluster(path, [f"launcher={flavour}", *restarts])
    return replace(cluster, python="/opt/venv/bin/python")


def job_of(cluster: ClusterConfig) -> JobFacts:
    nodes = tuple(f"node{number}" for number in range(cluster.nodes))
    return JobFacts("4711", 3, nodes, "10.0.0.1", master_port("4711", 3), "/home/me/work")


def commands_of(cluster: ClusterConfig) -> Iterator[tuple[str, Command]]:
    options = sbatch_options(
        cluster,
        name="small",
        log=log_pattern(Path("/shared/runs/small")),
        folder="/home/me/work",
        after="afterok:12",
        exclude=("node7",),
    )
    cluster_file = "/shared/runs/small/launch/cluster.toml"
    yield (
        "sbatch",
        sbatch_command(cluster, "/w/slurm/train.sbatch", RUN, cluster_file, options=options),
    )
    yield "step", step_command(cluster, "train", RUN, ("train.steps=5",), job_of(cluster))
    yield "other step", srun_command(cluster, job_of(cluster), ("python", "-c", "pass"))


def text_of(command: Command) -> str:
    environment = (f"  {name}={value}" for name, value in command.environment.items())
    return "\n".join([*environment, *(f"  {argument}" for argument in command.argv)])


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_commands_of_a_cluster(path: Path, flavour: str, update_golden: bool) -> None:
    cluster = cluster_of(path, flavour)
    text = "".join(f"{name}:\n{text_of(made)}\n" for name, made in commands_of(cluster))
    golden = GOLDEN / f"{path.stem}-{flavour}.txt"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "run pytest --update-golden if this change is wanted"


def test_no_snapshot_is_left_over() -> None:
    expected = {f"{path.stem}-{flavour}.txt" for path in FILES for flavour in FLAVOURS}
    assert {path.name for path in GOLDEN.iterdir()} == expected


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_step_fits_its_job(path: Path, flavour: str) -> None:
    cluster = cluster_of(path, flavour)
    found = dict(commands_of(cluster))
    wanted = options_of(found["sbatch"])
    for name in ("step", "other step"):
        step = options_of(found[name])
        assert step["--nodes"] == wanted["--nodes"]
        assert int(step["--ntasks"]) == int(step["--nodes"]) * int(step["--ntasks-per-node"])
        cpus = int(step["--ntasks-per-node"]) * int(step["--cpus-per-task"])
        assert cpus == int(wanted["--ntasks-per-node"]) * int(wanted["--cpus-per-task"])
        assert cpus == cluster.local_ranks * cluster.cpus_per_rank
    ranks = int(options_of(found["step"])["--ntasks"])
    assert ranks == (cluster.world_size if flavour == "srun" else cluster.nodes)


def options_of(command: Command) -> dict[str, str]:
    words = [word for word in command.argv if word.startswith("--")]
    pairs = [word.partition("=") for word in words]
    return {name: value for name, _, value in reversed(pairs)}


def test_excluded_nodes_of_file_and_life_come_together() -> None:
    cluster = ClusterConfig(exclude="node[1-2]")
    options = sbatch_options(cluster, name="n", log="l", folder="/", exclude=("node5", "node6"))
    assert "--exclude=node[1-2],node5,node6" in options
    plain = sbatch_options(ClusterConfig(), name="n", log="l", folder="/")
    assert not [option for option in plain if option.startswith("--exclude")]


def test_without_requeue() -> None:
    cluster = ClusterConfig(lives=LivesConfig(requeue=False))
    options = sbatch_options(cluster, name="n", log="l", folder="/")
    assert "--no-requeue" in options
    assert "--requeue" not in options


def test_variables_of_the_cluster_win() -> None:
    cluster = ClusterConfig(
        cpus_per_rank=4,
        network="eth0",
        environment={"OMP_NUM_THREADS": "2", "NCCL_SOCKET_IFNAME": "ib0"},
    )
    assert rank_environment(cluster) == {
        "OMP_NUM_THREADS": "2",
        "PYTHONUNBUFFERED": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "ib0",
    }


def test_ports_of_lives_differ_and_lie_below_the_ephemeral_range() -> None:
    ports = [master_port("812345", life) for life in range(1000)]
    assert len(set(ports)) == 1000
    assert all(20_000 <= port < 32_000 for port in ports)
    assert master_port("12_3", 0) == master_port("123", 0)
    neighbours = {master_port(str(job), life) for job in range(100, 150) for life in range(3)}
    assert len(neighbours) == 150


def test_torchrun_on_one_host_needs_no_endpoint() -> None:
    argv = torchrun_command("py", module_argv("train", "/r.toml", ("a=1",)), ranks_per_node=2)
    assert argv == (
        "py", "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--standalone",
        "--max-restarts=0", "-m", "mpotrain", "train", "/r.toml", "a=1",
    )  # fmt: skip


def test_torchrun_on_several_hosts() -> None:
    module = module_argv("tune", "/r.toml")
    made = [
        torchrun_command(
            "py",
            module,
            ranks_per_node=2,
            nodes=2,
            node_rank=rank,
            master=Endpoint("fd00::1", 29500),
            own_address=f"fd00::{rank + 1}",
            rendezvous_id="4711.3",
            max_restarts=1,
        )
        for rank in range(2)
    ]
    differing = [(a, b) for a, b in zip(*made, strict=True) if a != b]
    assert differing == [
        ("--rdzv-conf=is_host=1", "--rdzv-conf=is_host=0"),
        ("--node-rank=0", "--node-rank=1"),
        ("--local-addr=fd00::1", "--local-addr=fd00::2"),
    ]
    assert "--rdzv-endpoint=[fd00::1]:29500" in made[0]
    # A stop on request must not be taken for a failure and started again.
    assert made[0][-4:] == ("-m", "launcher.rank", "tune", "/r.toml")
    with pytest.raises(ValueError, match="endpoint"):
        torchrun_command("py", module, ranks_per_node=2, nodes=2)


def test_deepspeed_knows_hosts_in_order() -> None:
    argv = deepspeed_command(
        "py",
        module_argv("train", "/r.toml"),
        hosts={"b": 2, "a": 3},
        node_rank=1,
        master=Endpoint("b", 29500),
    )
    (world,) = (word.partition("=")[2] for word in argv if word.startswith("--world_info="))
    decoded = json.loads(base64.urlsafe_b64decode(world))
    assert list(decoded.items()) == [("b", [0, 1]), ("a", [0, 1, 2])]
    assert "--node_rank=1" in argv
    assert argv[-4:] == ("--module", "mpotrain", "train", "/r.toml")


def test_deepspeed_over_ssh() -> None:
    module = module_argv("train", "/r.toml")
    plain = deepspeed_over_ssh_command("py", module, hostfile="/h")
    master = deepspeed_over_ssh_command("py", module, hostfile="/h", master=Endpoint("a", 1))
    assert not [word for word in plain if "master" in word]
    assert "--force_multi" in plain
    assert {"--master_addr=a", "--master_port=1"} <= set(master)


def test_local_command_runs_in_the_container() -> None:
    container = ApptainerContainer(image="i.sif", binds=("/a:/b",), options=("--nv",))
    command = local_command(ClusterConfig(container=container), "train", "/r.toml", ("a=1",))
    assert command.argv == (
        "apptainer", "exec", "--bind=/a:/b", "--nv", "i.sif",
        "python3", "-m", "mpotrain", "train", "/r.toml", "a=1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small_1.5", "gpt2-small_1.5"),
        ("a b\nc'd\"e", "a_b_c_d_e"),
        ("$(touch x);|&", "__touch_x____"),
        ("--wrap=x", "wrap=x"),
        ("ünïcode-模型", "ünïcode-模型"),
        ("---", "mpotrain"),
        ("x" * 100, "x" * 64),
    ],
)
def test_job_names(name: str, expected: str) -> None:
    assert job_name(name) == expected


def test_percent_signs_of_a_folder_are_no_pattern() -> None:
    assert log_pattern(Path("/a/50%j")) == "/a/50%%j/logs/%j.log"
