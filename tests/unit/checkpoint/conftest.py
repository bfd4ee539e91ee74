"""Small checkpoints for the tests of this folder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.manifest import RngRule, RunState
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.parallel.ranks import World


@dataclass(frozen=True)
class Exported:
    name: str
    role: str
    tensors: Mapping[str, Tensor] | None


def exported_state(step: int) -> list[Exported]:
    """Return a made-up model whose numbers depend on the step."""
    rng = torch.Generator().manual_seed(step)

    def kinds(*shape: int) -> dict[str, Tensor]:
        return {
            kind: torch.randn(*shape, generator=rng) for kind in ("weight", "exp_avg", "exp_avg_sq")
        }

    return [
        Exported("embedding.weight", "dense", kinds(11, 6)),
        Exported("block.0.core.0", "auxiliary", kinds(1, 2, 3, 4)),
        Exported("block.0.core.1", "central", kinds(4, 5, 2, 1)),
        Exported("norm.scale", "dense", kinds(6)),
    ]


def run_state_of(step: int, **changes: Any) -> RunState:
    """Return the position of a made-up run."""
    values: dict[str, Any] = {
        "step": step,
        "consumed_samples": 8 * step,
        "num_updates": step - 1,
        "config": {"model": {"hidden": 6, "modes": (2, 3)}, "train": {"lr": 0.1}},
        "data_fingerprint": "d" * 32,
        "rng": RngRule(seed=7, rule="splitmix64"),
        "engine": {"kind": "local", "num_ranks": 1},
        "train_state": {"tokens": 123, "skipped": [3, 4]},
    }
    return RunState(**(values | changes))


@pytest.fixture
def exported() -> Callable[[int], list[Exported]]:
    return exported_state


@pytest.fixture
def run_state() -> Callable[..., RunState]:
    return run_state_of


@pytest.fixture
def item() -> type[Exported]:
    return Exported


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., CheckpointStore]]:
    stores = []

    def make(**options: Any) -> CheckpointStore:
        world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        settings = {
            key: options.pop(key) for key in ("keep_last", "keep_every", "verify") if key in options
        }
        store = CheckpointStore(
            tmp_path / "checkpoints", CheckpointConfig(**settings), world, **options
        )
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()
