"""Bytes of tokens against bytes of gradients, by hand."""

import pytest

from mpotrain.engine.config import DeepSpeedConfig, LocalConfig
from mpotrain.engine.expert_traffic import ExpertLayout, TokenFlow, expert_layouts, least_traffic

FLOW = TokenFlow(
    num_tokens=1000, top_k=2, hidden_size=64, width=2, num_mixtures=3, recomputed=False
)
SIZES = [(5_000, 0), (8_000, 8), (16_000, 8)]


def layouts(
    stage: int = 1, dtype: str = "fp32", world: int = 8, accumulation: int = 1
) -> dict[int, ExpertLayout]:
    engine = DeepSpeedConfig(zero_stage=stage, dtype=dtype)  # type: ignore[arg-type]
    found = expert_layouts(engine, SIZES, world, accumulation, FLOW)
    return {layout.ranks: layout for layout in found}


def test_tokens_travel_four_times_and_six_when_recomputed() -> None:
    everything = 2 * 1000 * 3 * 64 * 2
    assert FLOW.exchanged(1) == 0
    assert FLOW.exchanged(2) == 4 * everything // 2
    assert FLOW.exchanged(8) == 4 * everything * 7 // 8
    again = TokenFlow(1000, 2, 64, 2, 3, recomputed=True)
    assert again.exchanged(2) == 6 * everything // 2


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_gradients_are_reduced_over_the_ranks_with_the_same_experts(ranks: int) -> None:
    layout = layouts(accumulation=3)[ranks]
    local, same = 24_000 / ranks, 8 / ranks
    ring = (same - 1) / same * 4 * local
    assert layout.local_experts == 8 // ranks
    # DeepSpeed stage 1: fp32 all-reduce of gradients, then updated weights are gathered.
    assert layout.gradients == pytest.approx(2 * ring, abs=2)
    assert layout.weights == pytest.approx(ring, abs=2)
    assert layout.tokens == 3 * FLOW.exchanged(ranks)
    assert layout.total == layout.tokens + layout.gradients + layout.weights


def test_spread_experts_need_less_memory() -> None:
    states = [layout.state for layout in layouts().values()]
    assert states == sorted(states, reverse=True)
    # Weights and gradients of 24,000 elements are spread; masters and moments always were.
    one, eight = layouts()[1], layouts()[8]
    assert one.state - eight.state == pytest.approx((4 + 4) * 24_000 * 7 / 8, abs=8)


def test_only_degrees_that_can_run_are_listed() -> None:
    assert list(layouts(world=4)) == [1, 2, 4]
    assert list(layouts(world=12)) == [1, 2, 4]
    assert list(layouts(world=16)) == [1, 2, 4, 8]
    assert list(layouts(stage=3)) == [1]
    (local,) = expert_layouts(LocalConfig(), SIZES, 1, 1, FLOW)
    assert (local.ranks, local.total) == (1, 0)


def test_the_one_that_sends_least_is_named() -> None:
    # Few tokens, then many: experts stay where gradients are the smaller part.
    small = TokenFlow(1, 1, 64, 2, 3, recomputed=False)
    found = expert_layouts(DeepSpeedConfig(zero_stage=1), SIZES, 8, 1, small)
    assert least_traffic(found).ranks == 8
    assert least_traffic(list(layouts().values())).ranks == 1
