"""The Megatron engine against the local one on one rank: time, memory, agreement.

Run it with ``python -m benchmarks.engines [RUN] [key=value ...] [--device cuda] [--out FILE]``. All
engines hold the same network with the same start weights and take the same steps on random tokens;
one step of each in every round. On one rank nothing is communicated: what is seen is what the
schedule, the wrappers and the layers of the engine cost, and whether they compute the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.measure import environment, interleaved, peak_bytes
from mpotrain.assemble import build_engine, build_model, prepare_torch
from mpotrain.batch import Batch
from mpotrain.config import RunConfig, load_config
from mpotrain.engine.base import Engine
from mpotrain.engine.config import LocalConfig
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.parallel.environment import resolve_environment
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World, close_world, init_world

LOCAL = "local"
RUN = Path(__file__).parents[1] / "configs" / "runs" / "gpt2-small-ttm64.toml"
STEPS = 3
ONE = resolve_environment({})
"""A single process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; write a result file where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, default=RUN)
    parser.add_argument("overrides", nargs="*", help="key=value changes of the run file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    run = load_config(options.run, options.overrides)
    if run.model.kind != "gpt2":
        parser.error(f"{options.run}: a network of kind {run.model.kind}; give one of kind gpt2")
    result = measure(run, options.device, options.rounds)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in result["engines"].items():
        speed, memory = found["tokens_per_second"], found["peak_bytes"] / 2**20
        print(
            f"{name:<24} {speed:>12,.0f} tokens/s  {found['ratio']:.2f} x time  "
            f"{memory:>8,.0f} MiB  loss differs by {found['difference']:.1e}"
        )
    return 0


def measure(run: RunConfig, device: Literal["cpu", "cuda"], rounds: int) -> dict[str, Any]:
    """Return times, memory and agreement of the engines.

    Args:
        run: a run of GPT-2; its engine and degrees are replaced.
        device: "cpu" or "cuda".
        rounds: number of rounds.
    """
    dtype: Literal["bf16", "fp32"] = "bf16" if device == "cuda" else "fp32"
    engines: dict[str, LocalConfig | MegatronConfig] = {
        LOCAL: LocalConfig(dtype=dtype, device=device),
        "megatron": MegatronConfig(dtype=dtype, device=device),
        "megatron, cached weights": MegatronConfig(dtype=dtype, device=device, cache_weights=True),
    }
    world = init_world("megatron", device, ranks=ONE)
    try:
        prepare_torch(replace(run, engine=engines[LOCAL]))
        built = {name: _build(run, config, world) for name, config in engines.items()}
        steps = {name: _stepper(run, engine, world) for name, engine in built.items()}
        losses = {name: [step() for _ in range(STEPS)] for name, step in steps.items()}
        timings = interleaved(steps, LOCAL, rounds, world.device)
        tokens = run.train.global_batch_size * run.data.sequence_length
        found = {
            name: {
                **asdict(timing),
                "tokens_per_second": tokens / timing.seconds,
                "peak_bytes": peak_bytes(steps[name], world.device),
                "losses": losses[name],
                "difference": max(
                    abs(a - b) / b for a, b in zip(losses[name], losses[LOCAL], strict=True)
                ),
            }
            for name, timing in timings.items()
        }
        for engine in built.values():
            engine.close()
        return {"environment": environment(world.device), "run": run.name, "engines": found}
    finally:
        close_world(world)


def _build(run: RunConfig, config: LocalConfig | MegatronConfig, world: World) -> Engine:
    one = replace(run, engine=config, parallel=ParallelConfig())
    model = build_model(run.model, seed=run.train.seed, dtype=config.dtype)
    return build_engine(one, model, world)


def _stepper(run: RunConfig, engine: Engine, world: World) -> Callable[[], float]:
    """Return a function that takes one more step and tells the loss before it."""
    number = 0

    def step() -> float:
        nonlocal number
        number += 1
        result = engine.step(_batches(run, number, world), lr=1e-4, step=number)
        return result.loss

    return step


def _batches(run: RunConfig, step: int, world: World) -> list[Batch]:
    train, length = run.train, run.data.sequence_length
    draw = torch.Generator().manual_seed(step)
    shape = (train.global_batch_size, length + 1)
    ids = torch.randint(run.model.vocab_size, shape, generator=draw).to(world.device)
    return [
        Batch(rows[:, :-1], rows[:, 1:], torch.ones_like(rows[:, 1:], dtype=torch.bool), rows[:, 0])
        for rows in torch.split(ids, train.micro_batch_size)
    ]


if __name__ == "__main__":
    sys.exit(main())
