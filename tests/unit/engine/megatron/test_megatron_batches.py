"""Choices that are named for batches and worlds that do not fit: all of them do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpotrain.config import RunConfig, load_config
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.parallel.plan import ParallelConfig

DENSE = Path(__file__).resolve().parents[4] / "configs" / "runs" / "gpt2-small-dense.toml"


def gpt(**parallel: Any) -> RunConfig:
    """GPT-2 small: 16 samples in micro-batches of 2."""
    return replace(load_config(DENSE), engine=MegatronConfig(), parallel=ParallelConfig(**parallel))


def with_train(config: RunConfig, **sizes: int) -> RunConfig:
    return replace(config, train=replace(config.train, **sizes))


def test_batches_that_fit_neither_ranks_nor_rounds() -> None:
    config = with_train(gpt(pipeline=2, virtual_pipeline=2), global_batch_size=15)
    (line,) = [found for found in config.problems(4) if "cannot be cut" in found]
    found = re.search(r"train\.global_batch_size=(\d+) or (\d+)", line)
    assert found is not None
    sizes = [int(size) for size in found.groups()]
    assert sizes == [8, 16]
    for size in sizes:
        assert with_train(config, global_batch_size=size).problems(4) == []


def test_worlds_of_a_run_that_says_how_many_data_ranks_it_has() -> None:
    config = gpt(pipeline=2, data=4)
    line = next(found for found in config.problems(3) if "start" in found)
    assert "start 8 processes" in line
    assert config.problems(8) == []
