from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpotrain.errors import ParallelError
from mpotrain.parallel.plan import ParallelConfig, batch_layout, batch_problems

SIZES = st.integers(1, 12)


@given(SIZES, SIZES, SIZES)
def test_layout_deals_every_microbatch_once(micro: int, world: int, accumulation: int) -> None:
    layout = batch_layout(micro * world * accumulation, micro, world)
    assert (layout.num_microbatches, layout.accumulation) == (world * accumulation, accumulation)
    dealt = [layout.microbatch(a, r) for a in range(layout.accumulation) for r in range(world)]
    assert sorted(dealt) == list(range(layout.num_microbatches))
    assert batch_problems(micro * world * accumulation, micro, world) == []


@given(st.integers(1, 200), SIZES, SIZES)
def test_refusal_names_facts_and_only_valid_choices(size: int, micro: int, world: int) -> None:
    if size % (micro * world) == 0:
        return
    with pytest.raises(ParallelError) as caught:
        batch_layout(size, micro, world)
    text = str(caught.value)
    assert text.startswith(f"train.global_batch_size: {size} sequences")
    assert f"micro-batches of {micro} on {world} ranks" in text
    choices = text.partition("nearest valid choices: ")[2]
    for choice in choices.split(", or "):
        if choice.startswith("train.global_batch_size="):
            for value in choice.partition("=")[2].split(" or "):
                assert batch_problems(int(value), micro, world) == []
        elif choice.startswith("train.micro_batch_size="):
            for value in choice.partition("=")[2].split(" or "):
                assert batch_problems(size, int(value), world) == []
        else:
            for value in choice.removesuffix(" ranks").split(" or "):
                assert batch_problems(size, micro, int(value)) == []


def test_refusal_text() -> None:
    with pytest.raises(ParallelError) as caught:
        batch_layout(48, 8, 4)
    assert str(caught.value) == (
        "train.global_batch_size: 48 sequences cannot be cut into micro-batches of 8 on 4 ranks "
        "(48 is no multiple of 8 x 4 = 32); nearest valid choices: train.global_batch_size=32 or "
        "64, or train.micro_batch_size=6 or 12, or 3 or 6 ranks"
    )


def test_world_is_checked_against_the_run_file() -> None:
    (line,) = batch_problems(16, 2, 4, ParallelConfig(data=8))
    assert line.startswith("parallel.data: 8 ranks are expected, but the world has 4")
    assert batch_problems(16, 2, 4, ParallelConfig(data=4)) == []
    assert batch_problems(16, 2, 4, ParallelConfig()) == []
    assert ParallelConfig(data=0, expert=-1).problems("parallel") == [
        "parallel.data: 0 ranks; give at least 1, or leave it out",
        "parallel.expert: -1 ranks; give at least 1",
    ]


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ((0, 1, 1), "train.global_batch_size: 0"),
        ((4, -1, 1), "train.micro_batch_size: -1"),
        ((4, 1, 0), "parallel.data: 0"),
    ],
)
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int], key: str) -> None:
    (line,) = batch_problems(*sizes)
    assert line.startswith(key)
    with pytest.raises(ParallelError):
        batch_layout(*sizes)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, mpotrain.parallel.plan, mpotrain.parallel.environment, "
        "mpotrain.parallel.seeds, mpotrain.engine.config, mpotrain.engine.deepspeed_json;"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
