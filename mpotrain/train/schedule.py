"""Learning rate as a pure function of the step: nothing to save, nothing to restore (no torch).

Step s of a run of T steps (s = 0 .. T-1), with W steps of warm-up, has the learning rate

    lr * (s + 1) / (W + 1)                     s < W        (warm-up)
    lr * (m + (1 - m) * shape(p))              s >= W       (m = min_lr_ratio)

where p runs linearly from 0 at the first to 1 just behind the last step of the decay. These are
the warm-up schedules of Hugging Face transformers over T + 1 steps with W + 1 of warm-up, without
the useless step of learning rate zero at their beginning.
"""

from __future__ import annotations

import math

from mpotrain.train.config import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    WSDConfig,
)


def learning_rate(
    schedule: CosineConfig | LinearConfig | WSDConfig | ConstantConfig,
    step: int,
    total_steps: int,
) -> float:
    """Return the scheduled learning rate of one step, before any factor of a parameter group.

    Args:
        schedule: kind and constants of the schedule.
        step: number of the step, counted from 0 (= steps done before it). Beyond the end of the
            decay the learning rate stays at its minimum.
        total_steps: number of steps of the whole run.

    Returns:
        The learning rate, a positive number unless `min_lr_ratio` is 0 and the decay is over.

    Raises:
        ValueError: `step` is negative.
    """
    if step < 0:
        raise ValueError(f"steps count from 0, got {step}")
    if step < schedule.warmup_steps:
        return schedule.lr * (step + 1) / (schedule.warmup_steps + 1)
    if isinstance(schedule, ConstantConfig):
        return schedule.lr
    progress = _decay_progress(schedule, step, total_steps)
    floor = schedule.min_lr_ratio
    return schedule.lr * (floor + (1.0 - floor) * _decay_shape(schedule, progress))


def _decay_progress(
    schedule: CosineConfig | LinearConfig | WSDConfig, step: int, total_steps: int
) -> float:
    """Return how much of the decay lies behind `step`, in [0, 1]."""
    if isinstance(schedule, WSDConfig):
        start, length = total_steps - schedule.decay_steps, schedule.decay_steps
    else:
        start = schedule.warmup_steps
        length = total_steps - start if schedule.decay_steps is None else schedule.decay_steps
    if step >= start + length:
        return 1.0
    return max(0, step - start) / length


def _decay_shape(schedule: CosineConfig | LinearConfig | WSDConfig, progress: float) -> float:
    """Return the height of the decay, 1 at progress 0 and 0 at progress 1."""
    kind = schedule.decay_shape if isinstance(schedule, WSDConfig) else schedule.kind
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if kind == "linear":
        return 1.0 - progress
    return 1.0 - math.sqrt(progress)
