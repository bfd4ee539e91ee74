"""Learning rate: closed forms by hand, Hugging Face's schedulers, and the corners."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpotrain.train.config import ConstantConfig, CosineConfig, LinearConfig, WSDConfig
from mpotrain.train.schedule import learning_rate

PEAK = 3e-4


def curve(schedule: object, total: int) -> list[float]:
    return [learning_rate(schedule, step, total) for step in range(total)]  # type: ignore[arg-type]


def test_cosine_by_hand() -> None:
    schedule = CosineConfig(lr=1.0, warmup_steps=3, min_lr_ratio=0.2)
    expected = [0.25, 0.5, 0.75]
    expected += [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]
    assert curve(schedule, 8) == pytest.approx(expected, abs=1e-15)
    assert learning_rate(schedule, 8, 8) == pytest.approx(0.2, abs=1e-15)


def test_linear_by_hand_with_its_own_length() -> None:
    schedule = LinearConfig(lr=2.0, warmup_steps=1, min_lr_ratio=0.5, decay_steps=4)
    expected = [1.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0]
    assert curve(schedule, 8) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("sqrt", [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
    ],
)
def test_wsd_by_hand(shape: str, decay: list[float]) -> None:
    schedule = WSDConfig(lr=1.0, warmup_steps=1, decay_steps=4, decay_shape=shape)  # type: ignore[arg-type]
    assert curve(schedule, 8) == pytest.approx([0.5, 1.0, 1.0, 1.0, *decay], abs=1e-15)


def test_wsd_decay_moves_with_the_end_and_leaves_the_stable_phase_alone() -> None:
    schedule = WSDConfig(lr=1.0, warmup_steps=4, decay_steps=10)
    short, longer = curve(schedule, 50), curve(schedule, 80)
    assert short[:41] == longer[:41]
    assert short[-10:] == longer[-10:]
    assert short[41] < longer[41]


def test_constant_by_hand() -> None:
    schedule = ConstantConfig(lr=1.0, warmup_steps=1)
    assert curve(schedule, 4) == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("warmup", "total"), [(0, 17), (5, 40), (39, 40)])
@pytest.mark.parametrize("kind", ["cosine", "cosine_min", "linear", "wsd", "constant"])
def test_equals_hugging_face_one_step_ahead(kind: str, warmup: int, total: int) -> None:
    """Ours at s of T with W is theirs at s + 1 of T + 1 with W + 1: their zero is left out."""
    hf = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    ahead = {"num_warmup_steps": warmup + 1, "num_training_steps": total + 1}
    decay = total - warmup if kind == "wsd" and warmup == 39 else 7
    ours, theirs = {
        "cosine": lambda: (
            CosineConfig(lr=PEAK, warmup_steps=warmup, min_lr_ratio=0.0),
            hf.get_cosine_schedule_with_warmup(optimizer, **ahead),
        ),
        "cosine_min": lambda: (
            CosineConfig(lr=PEAK, warmup_steps=warmup, min_lr_ratio=0.0),
            hf.get_cosine_with_min_lr_schedule_with_warmup(optimizer, min_lr_rate=0.0, **ahead),
        ),
        "linear": lambda: (
            LinearConfig(lr=PEAK, warmup_steps=warmup, min_lr_ratio=0.0),
            hf.get_linear_schedule_with_warmup(optimizer, **ahead),
        ),
        "wsd": lambda: (
            WSDConfig(lr=PEAK, warmup_steps=warmup, decay_steps=decay, decay_shape="sqrt"),
            hf.get_wsd_schedule(optimizer, num_decay_steps=decay, decay_type="1-sqrt", **ahead),
        ),
        "constant": lambda: (
            ConstantConfig(lr=PEAK, warmup_steps=warmup),
            hf.get_constant_schedule_with_warmup(optimizer, warmup + 1),
        ),
    }[kind]()
    reference = []
    for _ in range(total):
        optimizer.step()
        theirs.step()
        reference.append(theirs.get_last_lr()[0])
    assert curve(ours, total) == pytest.approx(reference, rel=1e-12, abs=0)


def test_minimum_after_warmup_equals_hugging_face() -> None:
    hf = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = hf.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 5, 40, min_lr_rate=0.1)
    ours = CosineConfig(lr=PEAK, warmup_steps=5, min_lr_ratio=0.1)
    for step in range(40):
        if step >= 5:
            expected = theirs.get_last_lr()[0]
            assert learning_rate(ours, step, 40) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        theirs.step()


SCHEDULES = st.one_of(
    st.builds(
        CosineConfig,
        lr=st.floats(1e-6, 1.0),
        warmup_steps=st.integers(0, 60),
        min_lr_ratio=st.floats(0, 1),
        decay_steps=st.none() | st.integers(1, 80),
    ),
    st.builds(
        LinearConfig,
        lr=st.floats(1e-6, 1.0),
        warmup_steps=st.integers(0, 60),
        min_lr_ratio=st.floats(0, 1),
        decay_steps=st.none() | st.integers(1, 80),
    ),
    st.builds(
        WSDConfig,
        lr=st.floats(1e-6, 1.0),
        warmup_steps=st.integers(0, 60),
        decay_steps=st.integers(1, 60),
        decay_shape=st.sampled_from(["linear", "cosine", "sqrt"]),
        min_lr_ratio=st.floats(0, 1),
    ),
    st.builds(ConstantConfig, lr=st.floats(1e-6, 1.0), warmup_steps=st.integers(0, 60)),
)


@given(schedule=SCHEDULES, total=st.integers(1, 120))
def test_rises_to_the_peak_then_never_rises_and_no_step_is_wasted(
    schedule: CosineConfig | LinearConfig | WSDConfig | ConstantConfig, total: int
) -> None:
    if schedule.problems("s", total):
        return
    rates = curve(schedule, total)
    top = min(schedule.warmup_steps, total - 1)
    tolerance = 1e-12 * schedule.lr
    assert all(0 < rate <= schedule.lr + tolerance for rate in rates[: top + 1])
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b - tolerance for a, b in itertools.pairwise(rates[top:]))
    floor = getattr(schedule, "min_lr_ratio", 1.0) * schedule.lr
    assert min(rates[top:]) >= min(floor, rates[0]) - tolerance
    if schedule.warmup_steps < total and getattr(schedule, "decay_steps", None) is None:
        assert rates[schedule.warmup_steps] == pytest.approx(schedule.lr, rel=1e-12)
        assert rates[-1] > 0


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        learning_rate(ConstantConfig(lr=1.0), -1, 10)


def test_warmup_as_long_as_the_run_never_divides_by_zero() -> None:
    schedule = CosineConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    assert curve(schedule, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert learning_rate(schedule, 4, 4) == pytest.approx(0.1)
