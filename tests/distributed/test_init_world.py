"""Real processes that find each other through the environment of their launcher."""

from __future__ import annotations

import subprocess
import sys

import pytest
from run_process import free_port

PROGRAM = """
import torch
from mpotrain.parallel.ranks import close_world, init_world
world = init_world("deepspeed", "cpu")
total = world.all_reduce_sum(torch.tensor([world.rank + 1]))
stop = world.agree(85 if world.rank == 1 else 0)
print(world.rank, world.size, world.local_rank, world.backend, int(total), stop)
close_world(world)
"""


def environment_of(launcher: str, rank: int, port: int) -> dict[str, str]:
    shared = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    if launcher == "slurm":
        return shared | {
            "SLURM_JOB_ID": "41",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return shared | {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_processes_meet(launcher: str) -> None:
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment_of(launcher, rank, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(processes):
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            assert out.split() == [str(rank), "2", str(rank), "gloo", "3", "85"]
    finally:
        for process in processes:
            process.kill()
