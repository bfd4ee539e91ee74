"""The agent of a node: exact commands, and signals that reach ranks but not their launcher."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.agent import add_arguments, node_command
from launcher.cluster import ClusterConfig, LivesConfig
from launcher.job import JobFacts
from launcher.slurm_commands import agent_argv
from mpotrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
JOB = JobFacts("123_4", 2, ("n1", "n2"), "127.0.0.1", 20_123, "/w")

RANK = """\
import os, signal, sys, time
folder = os.environ["NOTES"]
seen = []
def take(number, frame):
    seen.append(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, take)
open(f"{folder}/ready-{os.environ['RANK']}", "w").close()
told = False
while len(seen) < 2:
    if seen and not told:
        told = True
        open(f"{folder}/first-{os.environ['RANK']}", "w").close()
    time.sleep(0.02)
open(f"{folder}/seen-{os.environ['RANK']}", "w").write(" ".join(map(str, seen)))
"""


def options(cluster: ClusterConfig, *overrides: str) -> argparse.Namespace:
    """Parse what the step of a life gives to its agents."""
    argv = agent_argv(cluster, "train", "/runs/a b/run.toml", overrides, JOB)
    start = argv.index("agent") + 1
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv[start:])


def cluster(launcher: str, restarts: int = 0) -> ClusterConfig:
    return ClusterConfig(
        nodes=2,
        ranks_per_node=2,
        launcher=launcher,  # type: ignore[arg-type]
        lives=LivesConfig(worker_restarts=restarts),
    )


def test_torchrun_on_the_second_node() -> None:
    command = node_command(options(cluster("torchrun", 1), "a=1", "b=x y"), {"SLURM_NODEID": "1"})
    for part in (
        "--nnodes=2",
        "--nproc-per-node=2",
        "--node-rank=1",
        "--rdzv-endpoint=127.0.0.1:20123",
        "--rdzv-id=123_4.2",
        "--rdzv-conf=is_host=0",
        "--local-addr=127.0.0.1",
        "--max-restarts=1",
    ):
        assert part in command.argv
    assert command.argv[0] == sys.executable
    assert command.argv[-4:] == ("train", "/runs/a b/run.toml", "a=1", "b=x y")


def test_deepspeed_on_the_first_node() -> None:
    command = node_command(options(cluster("deepspeed")), {"SLURM_NODEID": "0"})
    assert "--node_rank=0" in command.argv
    assert "--master_addr=127.0.0.1" in command.argv
    assert "--master_port=20123" in command.argv
    assert command.argv[-3:] == ("mpotrain", "train", "/runs/a b/run.toml")


@pytest.mark.parametrize("number", [None, "", "two", "2", "-1"])
def test_the_number_of_the_node_must_make_sense(number: str | None) -> None:
    environ = {} if number is None else {"SLURM_NODEID": number}
    with pytest.raises(ConfigError, match="SLURM_NODEID"):
        node_command(options(cluster("torchrun")), environ)


def wait_for(paths: list[Path], agent: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 180
    while not all(path.exists() for path in paths):
        assert agent.poll() is None, "the agent has ended"
        assert time.monotonic() < end, "the ranks did not answer"
        time.sleep(0.05)


@pytest.mark.slow
def test_signals_reach_the_ranks_and_the_launcher_lives(tmp_path: Path) -> None:
    # The real torchrun; a module named as the one that ranks run stands in for it.
    package = tmp_path / "mpotrain"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(RANK)
    # From the second line on the stand-in comes first, in children of the agent too.
    code = (
        "import argparse, os, sys, launcher.agent as agent\n"
        f"os.environ['PYTHONPATH'] = {str(tmp_path)!r}\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "parser = argparse.ArgumentParser()\n"
        "agent.add_arguments(parser)\n"
        "sys.exit(agent.main(parser.parse_args(sys.argv[1:])))\n"
    )
    one_node = JobFacts("5", 0, ("n1",), "127.0.0.1", 20_155, "/w")
    argv = agent_argv(cluster("torchrun"), "train", "run.toml", (), one_node)
    environment = {
        **os.environ,
        "SLURM_NODEID": "0",
        "NOTES": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    arguments = argv[argv.index("agent") + 1 :]
    agent = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)
    try:
        wait_for([tmp_path / "ready-0", tmp_path / "ready-1"], agent)
        agent.send_signal(signal.SIGUSR1)
        wait_for([tmp_path / "first-0", tmp_path / "first-1"], agent)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(180) == 0
    finally:
        agent.kill()
        agent.wait()
    for rank in (0, 1):
        assert (tmp_path / f"seen-{rank}").read_text() == "10 15"
