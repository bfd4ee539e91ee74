"""Repairs of megatron-core, each with a control: the bare package fails where it is mended.

If a control fails, the installed release has mended the defect: take the repair out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from distributed.megatron_grid import megatron_grid
from distributed.megatron_trained import SHAPES, Trained, bare, distance, keys
from torch import Tensor

from mpotrain.engine.megatron import fixes
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

ONE_TINY = ((3,),)


def router(world: World) -> None:
    with megatron_grid(world, ParallelConfig()):
        from megatron.core.transformer.moe import moe_utils

        vars(moe_utils).pop("te_general_gemm", None)
        tokens, weight = torch.randn(4, 3), torch.randn(5, 3)
        with pytest.raises(NameError, match="te_general_gemm"):
            moe_utils.router_gating_linear(tokens, weight, None, torch.float32)
        for _ in range(2):
            fixes.repair_modules()
        logits = moe_utils.router_gating_linear(tokens, weight, None, torch.float32)
        assert torch.allclose(logits, tokens @ weight.t())
        kept = moe_utils.te_general_gemm = object()
        fixes.repair_modules()
        assert moe_utils.te_general_gemm is kept
        moe_utils.te_general_gemm = None


def test_router_without_transformer_engine(run_ranks: Any) -> None:
    run_ranks(1)(router)


def load_before_the_first_step(world: World) -> None:
    with megatron_grid(world, ParallelConfig()):
        stock = Trained(world, repair=False)
        with pytest.raises(AssertionError):
            stock.sharded(is_loading=True)
        with pytest.raises(AssertionError):
            stock.optimizer.state_dict()
        repaired = Trained(world)
        assert keys(repaired.sharded(is_loading=True))
        for inner in (single.optimizer for single in repaired.optimizer.chained_optimizers):
            for state in inner.state.values():
                assert state["step"] == 0
                assert not state["exp_avg"].any()
                assert not state["exp_avg_sq"].any()
        # Such a state is what Adam itself begins with.
        untouched = Trained(world)
        untouched.advance(0, 2)
        repaired.advance(0, 2)
        assert distance(repaired.weights(), untouched.weights()) == 0


def test_state_before_the_first_step(run_ranks: Any) -> None:
    run_ranks(2)(load_before_the_first_step)


def resume(world: World, *, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> Any:
    with megatron_grid(world, ParallelConfig()):
        whole = Trained(world, dtype=dtype, shapes=shapes)
        whole.advance(0, 3)
        saved = whole.saved()
        whole.advance(3, 6)
        wanted = whole.weights()
        fresh = Trained(world, dtype=dtype, shapes=shapes)
        fresh.advance(20, 21)  # something to be overwritten
        fresh.load(saved)
        fresh.advance(3, 6)
        assert distance(fresh.weights(), wanted) == 0
        fresh = Trained(world, dtype=dtype, shapes=shapes)
        fresh.load(saved)
        assert distance(fresh.weights(), saved["weights"]) == 0
        fresh.advance(3, 6)
        assert distance(fresh.weights(), wanted) == 0
        return saved, wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_repeats_every_bit(run_ranks: Any, dtype: torch.dtype) -> None:
    run_ranks(2)(resume_of, dtype)


def resume_of(world: World, dtype: torch.dtype) -> None:
    resume(world, dtype=dtype, shapes=SHAPES)


def resume_with_an_idle_rank(world: World) -> None:
    """One bucket with three elements: all of them are the first rank's."""
    with megatron_grid(world, ParallelConfig()):
        stock = Trained(world, repair=False, shapes=ONE_TINY)
        stock.advance(0, 1)
        (single,) = stock.optimizer.chained_optimizers
        assert (len(single.optimizer.state) == 0) == (world.rank == 1)
        if world.rank == 1:
            with pytest.raises(AssertionError):
                stock.optimizer.state_dict()
        repaired = Trained(world, shapes=ONE_TINY)
        repaired.optimizer.state_dict()
        (single,) = repaired.optimizer.chained_optimizers
        assert len(single.optimizer.state) == (world.rank == 0)
    resume(world, dtype=torch.float32, shapes=ONE_TINY)


def test_a_rank_without_elements(run_ranks: Any) -> None:
    run_ranks(2)(resume_with_an_idle_rank)


def missing_counter(world: World) -> None:
    with megatron_grid(world, ParallelConfig()):
        first = Trained(world)
        first.advance(0, 2)
        saved = first.saved()
        stock = Trained(world)
        bare(stock.optimizer, "_set_main_param_and_optimizer_states")
        with pytest.raises(KeyError, match="step"):
            stock.load(saved)
        repaired = Trained(world)
        repaired.load(saved)
        assert repaired.moments() == first.moments()


def test_load_without_a_counter_of_each_parameter(run_ranks: Any) -> None:
    run_ranks(2)(missing_counter)


def counters(optimizer: Any) -> list[Tensor]:
    return [
        state["step"]
        for single in optimizer.chained_optimizers
        for state in single.optimizer.state.values()
    ]


def shared_counter(world: World) -> None:
    with megatron_grid(world, ParallelConfig()):
        whole = Trained(world)
        whole.advance(0, 2)
        saved = whole.saved()
        whole.advance(2, 4)
        stock = Trained(world)
        bare(stock.optimizer, "load_state_dict")
        stock.load(saved)
        steps = counters(stock.optimizer)
        assert len(steps) > 1
        assert len({id(step) for step in steps}) == 1
        stock.advance(2, 4)
        assert counters(stock.optimizer)[0].item() == 2 + 2 * len(steps)
        assert distance(stock.weights(), whole.weights()) > 1e-4
        repaired = Trained(world)
        repaired.load(saved)
        steps = counters(repaired.optimizer)
        assert len({id(step) for step in steps}) == len(steps)
        repaired.advance(2, 4)
        assert [step.item() for step in counters(repaired.optimizer)] == [4.0] * len(steps)
        assert distance(repaired.weights(), whole.weights()) == 0


def test_every_parameter_counts_for_itself(run_ranks: Any) -> None:
    run_ranks(2)(shared_counter)


def padded_buckets(world: World) -> None:
    with megatron_grid(world, ParallelConfig()):
        trained = Trained(world)
        (single,) = trained.optimizer.chained_optimizers
        (buffer,) = single.buffers
        assert len(buffer.buckets) > 2
        assert buffer.numel > buffer.numel_unpadded
        trained.advance(0, 2)
        main = trained.weights()  # fp32: the masters of all ranks together
        state = trained.saved()["optimizer"]["param_state"]
        held = {tuple(t["param"].flatten().tolist()) for t in state.values()}
        assert held == {tuple(weight.flatten().tolist()) for weight in main}
        packed = single.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        bare(trained.optimizer, "get_parameter_state_dp_zero")
        same = single.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        for dtype, tensors in same[0].items():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                # Other formats are read without padding.
                assert torch.equal(packed[0][dtype][name], tensors[name])
        state = trained.saved()["optimizer"]["param_state"]
        stock = {tuple(t["param"].flatten().tolist()) for t in state.values()}
        assert stock != held


def test_state_of_several_padded_buckets(run_ranks: Any) -> None:
    run_ranks(2)(padded_buckets)


def other_world(world: World, saved: Any) -> list[Tensor]:
    with megatron_grid(world, ParallelConfig()):
        fresh = Trained(world)
        fresh.load(saved)
        return [torch.cat([t.flatten() for t in fresh.weights()]), *moments_of(fresh)]


def moments_of(trained: Trained) -> list[Tensor]:
    state = trained.saved()["optimizer"]["param_state"]
    return [tensor for number in state for tensor in state[number].values()]


def resume_small(world: World) -> Any:
    return resume(world, dtype=torch.float32, shapes=SHAPES)[0]


def test_state_of_two_ranks_in_one(run_ranks: Any) -> None:
    saved = run_ranks(2)(resume_small)[0]
    (held,) = run_ranks(1)(other_world, saved)
    assert torch.equal(held[0], torch.cat([weight.flatten() for weight in saved["weights"]]))
    state = saved["optimizer"]["param_state"]
    wanted = [tensor for number in state for tensor in state[number].values()]
    assert all(torch.equal(a, b) for a, b in zip(held[1:], wanted, strict=True))


def who_is_repaired(world: World) -> None:
    with megatron_grid(world, ParallelConfig()):
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        trained = Trained(world)
        (single,) = trained.optimizer.chained_optimizers
        cls = type(single)
        assert isinstance(single, DistributedOptimizer)
        assert cls.__name__ == "AdamState"
        fixes.repair_optimizer(trained.optimizer)
        fixes.repair_optimizer(single)
        assert type(single) is cls
        for inner, has_counters in (
            (torch.optim.SGD([torch.zeros(1)], lr=0.1), False),
            (FusedAdam([torch.zeros(1)]), False),
            (torch.optim.Adam([torch.zeros(1)]), True),
        ):
            other = Trained(world, repair=False)
            (single,) = other.optimizer.chained_optimizers
            single.optimizer = inner
            fixes.repair_optimizer(single)
            assert type(single).__name__ == ("AdamState" if has_counters else "PaddedBuckets")
        untouched = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        fixes.repair_optimizer(untouched)
        assert type(untouched) is torch.optim.SGD


class FusedAdam(torch.optim.Optimizer):
    """What transformer-engine and apex tell of theirs."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.999), "bias_correction": True})


def test_which_optimizers_are_repaired(run_ranks: Any) -> None:
    run_ranks(1)(who_is_repaired)


def other_versions(world: World) -> None:
    import megatron.core.package_info as info

    with megatron_grid(world, ParallelConfig()):
        from megatron.core.transformer.moe import moe_utils

        assert fixes.is_affected()
        real = info.__version__
        try:
            for version, affected in (("0.16.9", True), ("0.17.0", False), ("1.16.0", False)):
                info.__version__ = version
                assert fixes.is_affected() == affected
            vars(moe_utils).pop("te_general_gemm", None)
            fixes.repair_modules()
            assert not hasattr(moe_utils, "te_general_gemm")
            trained = Trained(world)
            (single,) = trained.optimizer.chained_optimizers
            assert type(single).__name__ == "DistributedOptimizer"
        finally:
            info.__version__ = real
            fixes.repair_modules()


def test_other_versions_stay_as_they_are(run_ranks: Any) -> None:
    run_ranks(1)(other_versions)
