"""The learning rate of a training run as a function of the step (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mpotrain.schema import Check, collect_problems, config


@config
class CosineConfig:
    """Linear warm-up, then half a cosine down to `min_lr_ratio * lr`."""

    kind: Literal["cosine"] = "cosine"
    lr: float
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up before the peak."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the decay, as a part of the peak."""
    decay_steps: int | None = None
    """Length of the decay; absent: from the end of the warm-up to the end of training."""

    def problems(self, where: str, total_steps: int) -> list[str]:
        """Return what does not fit a run of `total_steps`, beginning with the key."""
        return collect_problems(
            *_shared_checks(self, where, total_steps), *_decay_checks(self, where)
        )


@config
class LinearConfig:
    """Linear warm-up, then a straight line down to `min_lr_ratio * lr`."""

    kind: Literal["linear"] = "linear"
    lr: float
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up before the peak."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the decay, as a part of the peak."""
    decay_steps: int | None = None
    """Length of the decay; absent: from the end of the warm-up to the end of training."""

    def problems(self, where: str, total_steps: int) -> list[str]:
        """Return what does not fit a run of `total_steps`, beginning with the key."""
        return collect_problems(
            *_shared_checks(self, where, total_steps), *_decay_checks(self, where)
        )


@config
class WSDConfig:
    """Warm-up, stable, decay (Hu et al. 2024): constant until the last `decay_steps`.

    A stable run can be extended: only the decay depends on where training ends.
    """

    kind: Literal["wsd"] = "wsd"
    lr: float
    """Learning rate of the stable phase."""
    warmup_steps: int = 0
    """Steps of linear warm-up before the stable phase."""
    decay_steps: int
    """Length of the decay, counted back from the end of training."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "sqrt"
    """Form of the decay; `sqrt` is 1 - sqrt(progress) (Haegele et al. 2024)."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the decay, as a part of the peak."""

    def problems(self, where: str, total_steps: int) -> list[str]:
        """Return what does not fit a run of `total_steps`, beginning with the key."""
        own = (*_shared_checks(self, where, total_steps), *_decay_checks(self, where))
        found = collect_problems(*own)
        # Numbers that are wrong in themselves would be wrong once more together.
        return found or collect_problems(lambda: self._length_problems(where, total_steps))

    def _length_problems(self, where: str, total_steps: int) -> list[str]:
        if self.warmup_steps + self.decay_steps <= total_steps:
            return []
        return [
            f"{where}.decay_steps: warm-up ({self.warmup_steps}) and decay ({self.decay_steps}) "
            f"do not fit into {total_steps} steps"
        ]


@config
class ConstantConfig:
    """Linear warm-up, then one learning rate to the end."""

    kind: Literal["constant"] = "constant"
    lr: float
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""

    def problems(self, where: str, total_steps: int) -> list[str]:
        """Return what does not fit a run of `total_steps`, beginning with the key."""
        return collect_problems(*_shared_checks(self, where, total_steps))


ScheduleConfig = Annotated[
    CosineConfig | LinearConfig | WSDConfig | ConstantConfig, Field(discriminator="kind")
]


def _shared_checks(
    schedule: CosineConfig | LinearConfig | WSDConfig | ConstantConfig,
    where: str,
    total_steps: int,
) -> tuple[Check, ...]:
    def lr() -> Iterator[str]:
        if schedule.lr <= 0:
            yield f"{where}.lr: must be positive, is {schedule.lr}"

    def warmup() -> Iterator[str]:
        if schedule.warmup_steps < 0:
            yield f"{where}.warmup_steps: must not be negative, is {schedule.warmup_steps}"
        elif schedule.warmup_steps > total_steps:
            yield (
                f"{where}.warmup_steps: {schedule.warmup_steps} steps of warm-up, "
                f"but the run has only {total_steps} steps"
            )

    return lr, warmup


def _decay_checks(
    schedule: CosineConfig | LinearConfig | WSDConfig, where: str
) -> tuple[Check, ...]:
    def ratio() -> Iterator[str]:
        if not 0 <= schedule.min_lr_ratio <= 1:
            yield f"{where}.min_lr_ratio: must be in [0, 1], is {schedule.min_lr_ratio}"

    def steps() -> Iterator[str]:
        if schedule.decay_steps is not None and schedule.decay_steps < 1:
            yield f"{where}.decay_steps: must be at least 1, is {schedule.decay_steps}"

    return ratio, steps
