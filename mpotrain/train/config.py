"""How a model is trained: steps, batch, optimizer, schedule, anomalies, logging (no torch)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from mpotrain.engine.config import CentralMaskConfig
from mpotrain.schema import Check, collect_problems, config, known_size
from mpotrain.train.schedule_config import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    ScheduleConfig,
    WSDConfig,
)

__all__ = [
    "AdamWConfig",
    "AnomalyConfig",
    "ConstantConfig",
    "CosineConfig",
    "LambConfig",
    "LinearConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "ScheduleConfig",
    "TrainConfig",
    "WSDConfig",
]

MOST_MINUTES = 7 * 24 * 60
"""Bound of time-outs: who wants to wait for a week wants to wait for ever."""


@config
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019) with a learning rate and decay of their own for cores.

    Decay follows GPT (Radford et al. 2018, "all non bias or gain weights"): matrices, cores and
    embeddings decay; norms, biases and other one-dimensional parameters never do.
    """

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of dense weights of two or more dimensions, embeddings included."""
    core_lr_factor: float = 1.0
    """Factor on the scheduled learning rate for the cores of matrix product operators."""
    core_weight_decay: float | None = None
    """Decoupled decay of cores; absent: the same as `weight_decay`. It decays the cores, which is
    not the same as decaying the matrix that they represent."""

    def problems(self, where: str) -> list[str]:
        """Return every impossible value, one line each, beginning with the key under `where`."""
        return collect_problems(*_moment_checks(self, where))


@config
class LambConfig:
    """LAMB (You et al. 2020, arXiv 1904.00962) for large batches, with the factors of AdamW.

    Every layer's update is scaled by its trust, the norm of the layer's weights over that of the
    update. A layer is one parameter (one core of an operator), or one expert's part of it.
    """

    kind: Literal["lamb"] = "lamb"
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decay of dense weights of two or more dimensions, embeddings included; part of the update
    that trust scales."""
    core_lr_factor: float = 1.0
    """Factor on the scheduled learning rate for the cores of matrix product operators."""
    core_weight_decay: float | None = None
    """Decay of cores; absent: the same as `weight_decay`."""
    min_trust: float | None = None
    """Least trust of a layer (MPOBERT: 0.01); absent: no bound."""
    max_trust: float | None = None
    """Largest trust of a layer (MPOBERT: 0.3); absent: no bound."""
    adapt_vectors: bool = False
    """Scale norms, biases and other one-dimensional parameters too; else their trust is 1, which
    is plain Adam, as in the LAMB of BERT."""

    def problems(self, where: str) -> list[str]:
        """Return every impossible value, one line each, beginning with the key under `where`."""

        def low() -> Iterator[str]:
            if self.min_trust is not None and self.min_trust < 0:
                yield f"{where}.min_trust: must not be negative, is {self.min_trust}"

        def high() -> Iterator[str]:
            if (most := self.max_trust) is not None and most <= 0:
                yield f"{where}.max_trust: must be positive, is {most} (leave out for none)"

        def bounds() -> Iterator[str]:
            least, most = self.min_trust, self.max_trust
            if least is not None and most is not None and least > most > 0:
                yield f"{where}.min_trust: {least} is larger than max_trust {most}"

        return collect_problems(*_moment_checks(self, where), low, high, bounds)


OptimizerConfig = Annotated[AdamWConfig | LambConfig, Field(discriminator="kind")]


@config
class AnomalyConfig:
    """What to do when the loss or the gradient is not finite, or jumps.

    A skipped step leaves weights, moments and the optimizer's counter as they were; the data
    position goes on, so that the run never meets the same batch again.
    """

    on_nonfinite: Literal["skip", "stop"] = "skip"
    """Skip an update with a loss or gradient norm of NaN or infinity, or stop the run at it."""
    spike_threshold: float | None = None
    """Skip an update whose loss is more than this many standard deviations above the mean of the
    last `window` accepted steps (6 is a common choice); absent: never."""
    grad_norm_threshold: float | None = None
    """The same for the gradient norm before clipping; absent: never."""
    window: int = 128
    """Accepted steps in the running mean; the tests begin when it is half full."""
    max_skips: int = 5
    """Stop the run after this many skipped steps in a row."""

    def problems(self, where: str) -> list[str]:
        """Return every impossible value, one line each, beginning with the key under `where`."""

        def threshold(key: str) -> Iterator[str]:
            value = getattr(self, key)
            if value is not None and value <= 0:
                yield f"{where}.{key}: must be positive, is {value} (leave out for never)"

        def window() -> Iterator[str]:
            if (steps := self.window) < 4:
                yield f"{where}.window: a standard deviation needs at least 4 steps, is {steps}"

        def skips() -> Iterator[str]:
            if self.max_skips < 1:
                yield f"{where}.max_skips: must be at least 1, is {self.max_skips}"

        thresholds = (partial(threshold, key) for key in ("spike_threshold", "grad_norm_threshold"))
        return collect_problems(*thresholds, window, skips)


@config
class ProfileConfig:
    """A trace of a few steps by torch.profiler, under `profile/` of the run folder."""

    start_step: int = 10
    """First step to record, counted from 0; the very first ones show warm-up only."""
    num_steps: int = 3
    """Number of steps to record."""
    memory: bool = False
    """Record allocations too; with CUDA also a snapshot for pytorch.org/memory_viz."""
    with_stack: bool = False
    """Record Python stacks (slow)."""
    all_ranks: bool = False
    """One trace for each rank instead of rank 0 alone."""

    def problems(self, where: str, total_steps: int) -> list[str]:
        """Return what does not fit a run of `total_steps`, beginning with the key."""

        def start() -> Iterator[str]:
            if self.start_step < 0:
                yield f"{where}.start_step: must not be negative, is {self.start_step}"

        def number() -> Iterator[str]:
            if self.num_steps < 1:
                yield f"{where}.num_steps: must be at least 1, is {self.num_steps}"

        def steps() -> Iterator[str]:
            first, end = self.start_step, self.start_step + self.num_steps
            if 0 <= first < end and end > total_steps:
                yield (
                    f"{where}.start_step: steps {first} to {end - 1} do not exist in a run of "
                    f"{total_steps} steps (0 to {total_steps - 1})"
                )

        return collect_problems(start, number, steps)


@config
class TrainConfig:
    """A training run: how long, on how much data at a time, by which rule."""

    steps: int
    """Number of optimizer steps of the whole run."""
    global_batch_size: int
    """Sequences of one step over all processes; never derived from the number of processes."""
    micro_batch_size: int
    """Sequences of one forward and backward pass on one process."""
    seed: int = 0
    """Seed of initial weights and dropout."""
    clip_norm: float = 1.0
    """Clip the global gradient norm to this value; 0: no clipping."""
    optimizer: OptimizerConfig = AdamWConfig()
    """Optimizer."""
    central_mask: CentralMaskConfig = CentralMaskConfig()
    """Random rest of central tensors; probability 0 = every update counts."""
    schedule: ScheduleConfig
    """Learning rate as a function of the step."""
    anomaly: AnomalyConfig = AnomalyConfig()
    """Policy for NaN, infinity and loss spikes."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int | None = None
    """Steps between two evaluations on the validation split; absent: none while training."""
    eval_sequences: int = 64
    """Validation sequences of one evaluation, the same ones every time."""
    spectra_every: int | None = None
    """Steps between two reports of bond spectra; absent: none while training."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    stop_after: int | None = None
    """End at this step for now: the schedule still belongs to all `steps`; absent: never."""
    time_limit_minutes: float | None = None
    """Save and stop after this time (wall clock of this start); absent: no limit."""
    hang_timeout_minutes: float = 20.0
    """Write where all ranks stand and end with exit code 86 when no rank has made progress for
    this long; 0: never. Longer than any step, evaluated batch or start-up phase."""
    deterministic: bool = True
    """Use deterministic kernels wherever torch has them (and warn where it has none): the same
    layout gives the same bits. Slower on CUDA."""
    profile: ProfileConfig | None = None
    """Record a profiler trace; absent: none."""

    @property
    def hang_timeout_seconds(self) -> float | None:
        """Seconds without progress that make a hang; None = never."""
        return 60 * self.hang_timeout_minutes or None

    def problems(self, where: str) -> list[str]:
        """Return everything that makes this run impossible, one line each.

        Args:
            where: dotted key of this section, at the head of every line.

        Returns:
            Problems of this section and of those inside it; empty when there are none.
        """
        return collect_problems(
            *(partial(_value_problems, self, where, key) for key in VALUES),
            partial(_batch_problems, self, where),
            lambda: self.optimizer.problems(f"{where}.optimizer"),
            lambda: self.central_mask.problems(f"{where}.central_mask"),
            lambda: self.schedule.problems(f"{where}.schedule", _known_steps(self)),
            lambda: self.anomaly.problems(f"{where}.anomaly"),
            partial(_profile_problems, self, f"{where}.profile"),
        )


COUNTS = ["steps", "global_batch_size", "micro_batch_size", "log_every", "eval_sequences"]
OPTIONAL_COUNTS = ["eval_every", "spectra_every", "stop_after"]
VALUES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(COUNTS + OPTIONAL_COUNTS, (lambda n: n >= 1, "must be at least 1, is {}")),
    "seed": (lambda n: 0 <= n < 2**31, "must be in [0, 2^31), is {}"),
    "clip_norm": (lambda x: x >= 0, "must not be negative, is {} (0: none)"),
    "time_limit_minutes": (lambda x: x > 0, "must be positive, is {} (leave out for none)"),
    "hang_timeout_minutes": (
        lambda x: 0 <= x < MOST_MINUTES,
        f"must be in [0, {MOST_MINUTES}), is {{}} (0: never)",
    ),
}
"""What each number alone must be, and how to say that it is not."""


def _value_problems(train: TrainConfig, where: str, key: str) -> list[str]:
    value, (is_possible, text) = getattr(train, key), VALUES[key]
    if value is None or is_possible(value):
        return []
    return [f"{where}.{key}: {text.format(value)}"]


def _batch_problems(train: TrainConfig, where: str) -> list[str]:
    micro, whole = train.micro_batch_size, train.global_batch_size
    if micro <= 0 or whole % micro == 0:
        return []
    return [f"{where}.micro_batch_size: {micro} does not divide global_batch_size {whole}"]


def _profile_problems(train: TrainConfig, where: str) -> list[str]:
    return [] if train.profile is None else train.profile.problems(where, _known_steps(train))


def _known_steps(train: TrainConfig) -> int:
    # A wrong number of steps is one mistake, not one more for everything that ends with them.
    return known_size(lambda: train.steps) or sys.maxsize


def _moment_checks(optimizer: AdamWConfig | LambConfig, where: str) -> tuple[Check, ...]:
    def betas() -> Iterator[str]:
        for beta in optimizer.betas:
            if not 0 <= beta < 1:
                yield f"{where}.betas: each must be in [0, 1), is {beta}"

    def eps() -> Iterator[str]:
        if optimizer.eps <= 0:
            yield f"{where}.eps: must be positive, is {optimizer.eps}"

    def factor() -> Iterator[str]:
        if optimizer.core_lr_factor <= 0:
            yield (
                f"{where}.core_lr_factor: must be positive, is {optimizer.core_lr_factor} "
                "(1.0 trains cores at the scheduled learning rate)"
            )

    def decay(key: str) -> Iterator[str]:
        value = getattr(optimizer, key)
        if value is not None and value < 0:
            yield f"{where}.{key}: must not be negative, is {value}"

    decays = (partial(decay, key) for key in ("weight_decay", "core_weight_decay"))
    return betas, eps, factor, *decays
