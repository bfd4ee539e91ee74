"""Real processes for tests: `mpotrain train` alone, under torchrun and under deepspeed."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.data.config import PrepareConfig
from mpotrain.data.prepare import prepare
from mpotrain.parallel.ranks import World
from mpotrain.train.journal import read_metrics

BASE = Path(__file__).resolve().parents[2] / "configs" / "base" / "gpt2-tiny.toml"
PYTHON = sys.executable
BIN = Path(sys.executable).parent

PORTS = range(12_000, 20_000)
PORTS_OF_WORKER = 500
_ports = itertools.count()

RUN = """
extends = ["{base}"]
name = "tiny"
folder = "{folder}"

[model]
vocab_size = 64
context_length = 16
hidden_size = 32
ffn_size = 128
dropout = 0.1

[model.sites]
c_fc = {{ kind = "ttm", rank = 8 }}
c_proj = {{ kind = "mpo", in_modes = [8, 4, 4], out_modes = [4, 2, 4], cap = 6 }}

[data]
sources = [{{ path = "{data}" }}]
sequence_length = 16
seed = 3
split = [0.8, 0.2, 0.0]

[train]
steps = 20
global_batch_size = 8
micro_batch_size = 2
seed = 7
log_every = 1
eval_every = 10
eval_sequences = 8
tensorboard = false

[train.optimizer]
kind = "adamw"
core_lr_factor = 0.5
core_weight_decay = 0.01

[train.schedule]
kind = "cosine"
lr = 5e-3
warmup_steps = 4

[checkpoint]
every = 5
keep_last = 9
"""


def write_run(folder: Path, data: Path) -> Path:
    """Write the run file of a tiny TTM GPT-2."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    path.write_text(
        RUN.format(base=BASE.as_posix(), folder=(folder / "run").as_posix(), data=data.as_posix())
    )
    return path


def prepare_markov(folder: Path, num_tokens: int = 40_000) -> Path:
    """Prepare tokens of a Markov chain."""
    config = PrepareConfig(
        sources=("synthetic:markov",), out=str(folder), num_tokens=num_tokens, num_workers=0
    )
    prepare(config, progress=False)
    return folder


def environment() -> dict[str, str]:
    """Return the environment of a started process: one thread, no rank of our own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BASE.parents[2])}


def free_port() -> int:
    """Return a TCP port that is free now, and will be when a launcher gets to use it.

    It lies below those that the kernel gives to anybody who asks for some port, as every rank
    does. Each process that tests has ports of its own and goes through them one after the other.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = PORTS.start + worker * PORTS_OF_WORKER % len(PORTS)
    while True:
        port = first + (os.getpid() + next(_ports)) % PORTS_OF_WORKER
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port


def command(launcher: str, world: int, arguments: Sequence[str]) -> list[str]:
    """Return the command line of `mpotrain ARGUMENTS` under a launcher."""
    if launcher == "alone":
        return [PYTHON, "-m", "mpotrain", *arguments]
    if launcher == "torchrun":
        start = [
            "torch.distributed.run",
            f"--nproc_per_node={world}",
            f"--master_port={free_port()}",
        ]
        return [PYTHON, "-m", *start, "-m", "mpotrain", *arguments]
    assert launcher == "deepspeed"
    start = [f"--num_gpus={world}", f"--master_port={free_port()}", "--module"]
    return [PYTHON, str(BIN / "deepspeed"), *start, "mpotrain", *arguments]


def train(
    run: Path, *overrides: str, launcher: str = "alone", world: int = 1, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Train to the end and check the exit code."""
    done = subprocess.run(
        command(launcher, world, ["train", str(run), *overrides]),
        capture_output=True, text=True, timeout=240, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(
    run: Path, *overrides: str, launcher: str = "alone", world: int = 1
) -> subprocess.Popen[str]:
    """Start training in a process group of its own and return at once."""
    return subprocess.Popen(
        command(launcher, world, ["train", str(run), *overrides]),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip


def wait_for_step(
    folder: Path, step: int, process: subprocess.Popen[str], timeout: float = 240
) -> None:
    """Wait until the journal of a run has reached a step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()[0]}")
        if (folder / "metrics.jsonl").exists() and any(
            record["step"] >= step for record in read_metrics(folder, "train")
        ):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """Return (step, loss, learning rate, gradient norm, samples) of every step."""
    keys = ("step", "loss", "lr", "grad_norm", "consumed_samples", "tokens")
    return [tuple(record[key] for key in keys) for record in read_metrics(folder, "train")]


def state(folder: Path, step: int) -> Mapping[str, Mapping[str, Any]]:
    """Return every tensor of a checkpoint."""
    world = World(0, 1, 0, __import__("torch").device("cpu"))
    reader = CheckpointStore(folder / "checkpoints", CheckpointConfig(), world).open(step)
    return {name: reader.read(name) for name in reader.manifest.tensors}
