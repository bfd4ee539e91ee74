"""Processes that save checkpoints and die while they do; started by the fault tests."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.manifest import RngRule, RunState
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.parallel.ranks import World

# A server that has imported torch once forks each child in milliseconds, free of our threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "mpotrain.checkpoint.store"])
NUM_PARAMETERS = 6
KINDS = ("weight", "exp_avg", "exp_avg_sq")
PART_BYTES = 3000
COLLECTIVE_SECONDS = 480
"""After which a rank no longer waits for one that is silent."""


@dataclass(frozen=True)
class Exported:
    name: str
    role: str
    tensors: dict[str, torch.Tensor] | None


def initial_state() -> dict[str, dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return {
        f"layer.{index}.weight": {kind: torch.randn(8, 16, generator=rng) for kind in KINDS}
        for index in range(NUM_PARAMETERS)
    }


def advance(state: dict[str, dict[str, torch.Tensor]], step: int) -> None:
    """Make one step of a training whose result depends on every step before."""
    for kinds in state.values():
        for tensor in kinds.values():
            tensor.copy_(torch.sin(1.7 * tensor + step))


def state_after(step: int) -> dict[str, dict[str, torch.Tensor]]:
    state = initial_state()
    for number in range(1, step + 1):
        advance(state, number)
    return state


def differences(store: CheckpointStore, step: int) -> list[str]:
    """Compare a checkpoint with an undisturbed run; return the parameters that differ."""
    reader, wanted = store.open(step), state_after(step)
    assert list(reader.manifest.tensors) == list(wanted)
    return [
        f"{name} {kind}"
        for name, kinds in wanted.items()
        for kind, tensor in reader.read(name).items()
        if not torch.equal(tensor, kinds[kind])
    ]


def run_state(step: int) -> RunState:
    return RunState(
        step=step,
        consumed_samples=4 * step,
        num_updates=step,
        config={},
        data_fingerprint=None,
        rng=RngRule(seed=0, rule="none"),
        engine={},
        train_state={},
    )


def export(
    state: dict[str, dict[str, torch.Tensor]], world: World, collective: bool = True
) -> Iterator[Exported]:
    """Yield parameters as an engine does: one collective for each, tensors on its owner."""
    for index, (name, kinds) in enumerate(state.items()):
        if collective:
            world.all_reduce_sum(torch.ones(1))
        yield Exported(name, "dense", kinds if index % world.size == world.rank else None)


def alone() -> World:
    return World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def open_store(folder: Path, world: World | None = None, **settings: Any) -> CheckpointStore:
    points = {key: settings.pop(key) for key in ("on_point",) if key in settings}
    return CheckpointStore(
        folder,
        CheckpointConfig(every=1, **settings),
        alone() if world is None else world,
        part_bytes=PART_BYTES,
        **points,
    )


def dying(point: str, occurrence: int) -> Callable[[str], None]:
    """Return an observer that kills its process at the n-th visit of a point."""
    visits = 0

    def on_point(name: str) -> None:
        nonlocal visits
        visits += name == point
        if name == point and visits == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_point


def train(
    folder: Path,
    last_step: int,
    *,
    world: World | None = None,
    on_point: Callable[[str], None] = lambda name: None,
    keep_last: int = 2,
    report: Callable[[int], None] = lambda step: None,
) -> None:
    """Resume, train to `last_step` and save after every step."""
    world = alone() if world is None else world
    store = open_store(folder, world, keep_last=keep_last, on_point=on_point)
    store.claim()
    manifest = store.latest()
    state, first = initial_state(), 1
    if manifest is not None:
        reader, first = store.open(manifest.step), manifest.step + 1
        for name, kinds in state.items():
            for kind, tensor in reader.read(name).items():
                kinds[kind].copy_(tensor)
    for step in range(first, last_step + 1):
        advance(state, step)
        store.save(run_state(step), export(state, world))
        report(step)
    store.close()


def train_until(folder: Path, last_step: int, kill: tuple[str, int] | None, keep_last: int) -> None:
    train(folder, last_step, keep_last=keep_last, **({"on_point": dying(*kill)} if kill else {}))


def train_and_report(folder: Path, last_step: int, channel: Any) -> None:
    channel.send(0)
    train(folder, last_step, report=channel.send)


def save_again(folder: Path, step: int, kill: tuple[str, int]) -> None:
    """Save a step a second time with other content and die on the way."""
    store = open_store(folder, on_point=dying(*kill))
    state = state_after(step)
    for kinds in state.values():
        for tensor in kinds.values():
            tensor.neg_()
    store.save(run_state(step), export(state, store.world))


def as_rank(
    rank: int, size: int, meeting: Path, answers: Any, target: Callable[..., Any], args: tuple
) -> None:
    """Join the others, run `target(world, *args)` and send what it returns or raises."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(meeting), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    world = World(rank, size, rank, torch.device("cpu"), "gloo")
    try:
        answers.put((rank, target(world, *args)))
    except Exception as error:
        answers.put((rank, error))
    dist.destroy_process_group()


def start_ranks(
    size: int, meeting: Path, target: Callable[..., Any], *args: Any
) -> tuple[list[BaseProcess], Any]:
    answers = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(
            target=as_rank, args=(rank, size, meeting, answers, target, args), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, answers


def run_ranks_once(size: int, meeting: Path, target: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `target` on all ranks and return what each returned or raised."""
    processes, answers = start_ranks(size, meeting, target, *args)
    found = dict(answers.get(timeout=240) for _ in processes)
    for process in processes:
        process.join(30)
    return [found[rank] for rank in range(size)]


def train_ranks(world: World, folder: Path, last_step: int) -> list[str]:
    train(folder, last_step, world=world)
    store = open_store(folder, world)
    manifest = store.latest()
    return [f"step {manifest.step}", *differences(store, manifest.step)]


def train_ranks_one_dies(world: World, folder: Path, last_step: int, kill: Any, victim: int) -> str:
    on_point = dying(*kill) if world.rank == victim else (lambda name: None)
    train(folder, last_step, world=world, on_point=on_point)
    return "not killed"


def train_ranks_one_slow(world: World, folder: Path, last_step: int, seconds: float) -> str:
    """Let rank 1 take its time over its last part, when no collective holds rank 0 back."""
    visits = {"begin": 0, "part_written": 0}

    def slow(name: str) -> None:
        if name in visits:
            visits[name] += 1
        if name == "begin":
            visits["part_written"] = 0
        last_part = name == "part_written" and visits == {"begin": last_step, "part_written": 2}
        if last_part and world.rank == 1:
            time.sleep(seconds)
            (folder.parent / "rank 1 is done").touch()

    train(folder, last_step, world=world, on_point=slow)
    return "done"


def save_with_full_disk(world: World, folder: Path, step: int, victim: int, limit: int) -> str:
    """Let one rank meet a limit on the size of files, then try again without it."""
    import resource

    store = open_store(folder, world)
    state = state_after(step)
    if world.rank == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    text = "no error"
    try:
        store.save(run_state(step), export(state, world))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    if world.rank == victim:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    world.barrier()
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("step"))
    store_again = open_store(folder, world)
    previous = store_again.latest()
    world.barrier()
    store.save(run_state(step), export(state, world))
    return f"{text}\nleft {left}\nprevious {previous.step}\nnow {store_again.latest().step}"


def choose_step(world: World, folder: Path) -> tuple[int, list[int]]:
    store = open_store(folder, world)
    manifest = store.latest()
    return manifest.step, sorted(store.rejected)


def files_of(path: Path) -> list[Path]:
    return sorted(item for item in path.iterdir() if item.is_file())
