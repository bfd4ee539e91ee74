"""The grid of ranks, against megatron-core's own numbering."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from mpotrain.parallel.grid import DENSE_AXES, EXPERT_AXES, grid_text, rank_grid
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

ORDER = "tp-cp-ep-dp-pp"
"""The order that megatron-core takes where it is told nothing."""
TOKENS = {
    "tensor": "tp", "context": "cp", "data": "dp", "pipeline": "pp",
    "expert_tensor": "tp", "expert": "ep", "expert_data": "dp",
}  # fmt: skip


def core_groups(world: World, degrees: list[tuple[int, ...]], size: int) -> list[dict[str, Any]]:
    """Return megatron-core's groups of every axis for each choice of tp, cp, pp, ep, etp."""
    import inspect

    from megatron.core import parallel_state as state

    default = inspect.signature(state.initialize_model_parallel).parameters["order"].default
    assert default == ORDER
    found = []
    for tp, cp, pp, ep, etp in degrees:
        dense = state.RankGenerator(
            tp=tp, ep=1, dp=size // (tp * cp * pp), pp=pp, cp=cp, order=ORDER
        )
        expert = state.RankGenerator(
            tp=etp, ep=ep, dp=size // (etp * ep * pp), pp=pp, cp=1, order=ORDER
        )
        groups = {axis: dense.get_ranks(TOKENS[axis]) for axis in DENSE_AXES}
        groups |= {
            axis: expert.get_ranks(TOKENS[axis]) for axis in EXPERT_AXES if axis not in groups
        }
        assert expert.get_ranks("pp") == groups["pipeline"]
        found.append(groups)
    return found


@pytest.mark.parametrize("size", [8, 24])
def test_groups_are_those_of_megatron_core(
    size: int, run_ranks: Callable[[int], Callable[..., list[Any]]]
) -> None:
    choices = [d for d in range(1, size + 1) if size % d == 0 and d <= 8]
    degrees = [
        (tp, cp, pp, ep, etp)
        for tp, cp, pp, ep in product(choices, repeat=4)
        for etp in {1, tp}
        if size % (tp * cp * pp) == 0 and size % (etp * ep * pp) == 0
    ]
    assert len(degrees) > 40
    for chosen, groups in zip(degrees, run_ranks(1)(core_groups, degrees, size)[0], strict=True):
        tp, cp, pp, ep, etp = chosen
        parallel = ParallelConfig(tensor=tp, context=cp, pipeline=pp, expert=ep, expert_tensor=etp)
        grid = rank_grid(parallel, size)
        assert grid is not None
        assert grid.world_size == size
        for axis, expected in groups.items():
            assert {tuple(grid.group(rank, axis)) for rank in range(size)} == {
                tuple(group) for group in expected
            }, (chosen, axis)
            for group in expected:
                axes = DENSE_AXES if axis in DENSE_AXES else EXPERT_AXES
                places = [grid.coordinates(rank, axes)[axis] for rank in group]
                assert places == list(range(len(group)))


def test_degrees_that_do_not_divide_the_world_have_no_grid() -> None:
    assert rank_grid(ParallelConfig(tensor=3), 8) is None
    assert rank_grid(ParallelConfig(pipeline=2, expert=8), 8) is None
    assert rank_grid(ParallelConfig(tensor=2, expert=8), 8) is not None


def test_data_rank_of_a_process_is_its_place_on_the_data_axis() -> None:
    torch = pytest.importorskip("torch")
    parallel = ParallelConfig(tensor=2, context=2, pipeline=2)
    grid = rank_grid(parallel, 16)
    assert grid is not None
    for rank in range(16):
        world = World(rank, 16, rank, torch.device("cpu"), parallel=parallel)
        assert world.data_rank == grid.coordinates(rank)["data"]
        assert world.data_size == grid.data == 2


def test_the_grid_in_one_line() -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, pipeline=2)
    grid = rank_grid(parallel, 8)
    assert grid is not None
    assert grid_text(grid) == "8 ranks = tensor 2 x data 2 x pipeline 2"
    grid = rank_grid(ParallelConfig(tensor=2, expert=2, expert_tensor=2), 8)
    assert grid is not None
    assert grid_text(grid) == (
        "8 ranks = tensor 2 x data 4; of experts expert tensor 2 x expert 2 x expert data 2"
    )
