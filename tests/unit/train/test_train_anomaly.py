"""The guard against NaN and spikes, against a plain numpy reference."""

import json
import math

import numpy as np
import pytest

from mpotrain.errors import EXIT_ANOMALY, AnomalyError, CheckpointError
from mpotrain.train.anomaly import RELATIVE_FLOOR, AnomalyGuard
from mpotrain.train.config import AnomalyConfig

NONFINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", NONFINITE)
def test_nonfinite_loss_or_norm_is_skipped_and_counted(value: float) -> None:
    guard = AnomalyGuard(AnomalyConfig())
    assert guard(3.0, 1.0) is None
    assert guard(value, 1.0) == f"loss is {value}"
    assert guard(3.0, value) == f"gradient norm is {value}"
    assert (guard.num_nonfinite, guard.num_spikes, guard.num_skipped) == (2, 0, 2)
    assert guard.consecutive == 2
    guard.check()
    assert guard(3.0, 1.0) is None
    assert guard.consecutive == 0


def test_stop_policy_stops_at_the_first_one_and_a_spike_does_not() -> None:
    guard = AnomalyGuard(AnomalyConfig(on_nonfinite="stop", spike_threshold=3.0, window=4))
    for loss in (1.0, 1.1, 0.9, 1.0):
        guard(loss, 1.0)
    assert guard(50.0, 1.0) is not None
    guard.check()
    assert guard(math.nan, 1.0) is not None
    with pytest.raises(AnomalyError, match=r"loss is nan.*on_nonfinite") as caught:
        guard.check()
    assert caught.value.exit_code == EXIT_ANOMALY


def test_only_skips_in_a_row_stop_the_run() -> None:
    guard = AnomalyGuard(AnomalyConfig(max_skips=3))
    for _ in range(5):
        guard(math.nan, 1.0)
        guard(math.nan, 1.0)
        guard.check()
        guard(1.0, 1.0)
        guard.check()
    for _ in range(2):
        guard(math.nan, 1.0)
        guard.check()
    guard(1.0, math.inf)
    with pytest.raises(AnomalyError, match=r"3 steps in a row.*gradient norm is inf"):
        guard.check()


def reference(losses: np.ndarray, threshold: float, window: int) -> list[bool]:
    """Which losses are spikes, by numpy over the accepted ones."""
    accepted: list[float] = []
    result = []
    for loss in losses:
        recent = np.array(accepted[-window:], dtype=np.float64)
        spike = False
        if len(recent) >= window // 2:
            floor = RELATIVE_FLOOR * abs(recent.mean())
            spike = loss > recent.mean() + threshold * max(recent.std(ddof=1), floor)
        result.append(bool(spike))
        if not spike:
            accepted.append(float(loss))
    return result


@pytest.mark.parametrize("signal", ["loss", "grad_norm"])
@pytest.mark.parametrize(("threshold", "window"), [(2.0, 8), (3.0, 16), (6.0, 32)])
def test_spikes_equal_the_reference(signal: str, threshold: float, window: int) -> None:
    generator = np.random.default_rng(window)
    values = 3.0 + 0.1 * generator.standard_normal(400) - np.linspace(0, 1, 400)
    values[generator.integers(0, 400, 20)] += generator.uniform(0.2, 5.0, 20)
    if signal == "loss":
        guard = AnomalyGuard(
            AnomalyConfig(spike_threshold=threshold, window=window, max_skips=10**6)
        )
        found = [guard(float(value), 1.0) is not None for value in values]
    else:
        guard = AnomalyGuard(
            AnomalyConfig(grad_norm_threshold=threshold, window=window, max_skips=10**6)
        )
        found = [guard(1.0, float(value)) is not None for value in values]
    expected = reference(values, threshold, window)
    assert found == expected
    assert 5 < sum(expected) < 100
    assert guard.num_spikes == sum(expected)


def test_without_threshold_no_spike_is_skipped() -> None:
    guard = AnomalyGuard(AnomalyConfig(window=4))
    for loss in (1.0, 1.0, 1.0, 1.0, 1e9):
        assert guard(loss, loss) is None


def test_no_test_before_the_window_is_half_full() -> None:
    guard = AnomalyGuard(AnomalyConfig(spike_threshold=1.0, window=8))
    assert [guard(loss, 1.0) for loss in (1.0, 1.0, 99.0, 1.0)] == [None] * 4
    assert guard(1e6, 1.0) is not None


def test_rounding_on_a_plateau_is_no_spike() -> None:
    guard = AnomalyGuard(AnomalyConfig(spike_threshold=6.0, window=8))
    for _ in range(8):
        assert guard(2.0, 1.0) is None
    assert guard(2.0 * (1 + 5 * RELATIVE_FLOOR), 1.0) is None
    assert guard(2.0 * (1 + 50 * RELATIVE_FLOOR), 1.0) is not None


def test_lasting_new_level_stops_the_run() -> None:
    guard = AnomalyGuard(AnomalyConfig(spike_threshold=4.0, window=8, max_skips=5))
    for loss in (2.0, 2.1, 1.9, 2.0, 2.05, 1.95):
        guard(loss, 1.0)
    for _ in range(4):
        assert guard(9.0, 1.0) is not None
        guard.check()
    guard(9.0, 1.0)
    with pytest.raises(AnomalyError, match="is a spike"):
        guard.check()


def test_resumed_guard_decides_as_the_uninterrupted_one() -> None:
    config = AnomalyConfig(spike_threshold=2.0, grad_norm_threshold=3.0, window=8, max_skips=10**6)
    generator = np.random.default_rng(1)
    steps = [(float(a), float(b)) for a, b in 2 + generator.standard_normal((120, 2))]
    steps[50], steps[51] = (math.nan, 1.0), (1.0, math.inf)
    straight = AnomalyGuard(config)
    whole = [straight(*step) for step in steps]
    for cut in (3, 51, 52, 90):
        first, second = AnomalyGuard(config), AnomalyGuard(config)
        for step in steps[:cut]:
            first(*step)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert second.consecutive == first.consecutive
        assert [second(*step) for step in steps[cut:]] == whole[cut:]
        assert second.state_dict() == straight.state_dict()


def test_skips_in_a_row_go_on_over_a_resume() -> None:
    config = AnomalyConfig(max_skips=3)
    first = AnomalyGuard(config)
    first(math.nan, 1.0)
    first(math.nan, 1.0)
    second = AnomalyGuard(config)
    second.load_state_dict(first.state_dict())
    second.check()
    second(math.nan, 1.0)
    with pytest.raises(AnomalyError, match="3 steps in a row"):
        second.check()


def test_resume_under_a_stricter_limit_waits_for_a_step() -> None:
    first = AnomalyGuard(AnomalyConfig(max_skips=9))
    for _ in range(4):
        first(math.nan, 1.0)
    for loss, stops in ((1.0, False), (math.nan, True)):
        second = AnomalyGuard(AnomalyConfig(max_skips=2))
        second.load_state_dict(first.state_dict())
        second.check()
        second(loss, 1.0)
        if stops:
            with pytest.raises(AnomalyError, match="5 steps in a row"):
                second.check()
        else:
            second.check()


def test_shorter_window_keeps_the_newest_steps() -> None:
    first = AnomalyGuard(AnomalyConfig(window=8))
    for loss in range(8):
        first(float(loss), float(-loss))
    second = AnomalyGuard(AnomalyConfig(window=4))
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["losses"] == [4.0, 5.0, 6.0, 7.0]
    assert second.state_dict()["grad_norms"] == [-4.0, -5.0, -6.0, -7.0]


@pytest.mark.parametrize(
    "broken",
    [{}, {"losses": None}, {"losses": ["x"], "grad_norms": []}],
)
def test_broken_state_is_a_checkpoint_error(broken: dict[str, object]) -> None:
    guard = AnomalyGuard(AnomalyConfig())
    with pytest.raises(CheckpointError, match="anomaly state"):
        guard.load_state_dict(broken)
