"""Real ranks on two "hosts" of one machine: one is killed, all start anew, a signal stops them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launch_fakes import ROOT
from run_process import free_port

from mpotrain.errors import EXIT_STOPPED, StorageError
from mpotrain.train.journal import read_metrics

RUN = f"""\
extends = ['{ROOT}/configs/base/gpt2-tiny.toml']
name = "small"
folder = "run"
model = {{ vocab_size = 16, hidden_size = 16, ffn_size = 32, num_layers = 1 }}
checkpoint = {{ every = 20 }}
engine = {{ kind = "deepspeed", device = "cpu" }}

[data]
sources = [{{ path = "data" }}]
sequence_length = 16
split = [1.0, 0.0, 0.0]

[train]
steps = 100000
global_batch_size = 2
micro_batch_size = 1
log_every = 1
optimizer = {{ kind = "adamw" }}
schedule = {{ kind = "constant", lr = 1e-3 }}
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    (tmp_path / "run.toml").write_text(RUN)
    prepare = ["prepare", "--synthetic", "markov", "--tokens", "20000", "--out", "data"]
    subprocess.run(
        [sys.executable, "-m", "mpotrain", *prepare],
        cwd=tmp_path,
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for host in found:
        family = psutil.Process(host.pid).children(recursive=True) if host.poll() is None else []
        for process in [*family, host]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        host.wait()


def start(folder: Path, node_rank: int, port: int) -> subprocess.Popen[bytes]:
    arguments = [
        "torchrun", "run.toml", "--ranks-per-node=1", "--nodes=2", f"--node-rank={node_rank}",
        f"--master=127.0.0.1:{port}", "--max-restarts=1",
    ]  # fmt: skip
    with (folder / f"host{node_rank}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log,
        )  # fmt: skip


def ranks_of(host: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(host.pid).children(recursive=True)
        return [process for process in family if "torch.distributed.run" not in process.cmdline()]
    return []


def wait_for_step(folder: Path, step: int, starts: int) -> int:
    """Wait until a start has gone beyond a step; return where it stands."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, StorageError):
            lines = (folder / "run" / "environment.jsonl").read_text().splitlines()
            steps = [line["step"] for line in read_metrics(folder / "run")]
            last = max(steps, default=0)
            if len(lines) >= starts and last > step:
                return int(last)
        time.sleep(0.1)
    logs = "\n".join((folder / f"host{rank}.log").read_text() for rank in range(2))
    pytest.fail(f"no step beyond {step} in start {starts}\n{logs}")


@pytest.mark.slow
def test_killed_rank_on_two_hosts(tmp_path: Path, hosts: list[subprocess.Popen[bytes]]) -> None:
    port = free_port()
    hosts += [start(tmp_path, node_rank, port) for node_rank in (1, 0)]
    killed_at = wait_for_step(tmp_path, 45, starts=1)
    ranks_of(hosts[0])[0].kill()
    wait_for_step(tmp_path, killed_at + 5, starts=2)
    starts = (tmp_path / "run" / "environment.jsonl").read_text().splitlines()
    resumed_at = json.loads(starts[1])["step"]
    assert resumed_at >= 40  # from a checkpoint, and not from nothing
    assert resumed_at % 20 == 0
    # One host is asked; all stop, and none takes that for a failure that it could mend.
    hosts[0].send_signal(signal.SIGUSR1)
    assert [host.wait(180) for host in hosts] == [EXIT_STOPPED, EXIT_STOPPED]
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["outcome"] == "resume"
    assert len((tmp_path / "run" / "environment.jsonl").read_text().splitlines()) == 2
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps))
