"""How a model is trained: steps, batch, optimizer, schedule, anomalies, logging (no torch)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from mpotrain.engine.config import CentralMaskConfig
from mpotrain.schema import collect_problems, config

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
        return _moment_problems(self, where)


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
        found = _moment_problems(self, where)
        low, high = self.min_trust, self.max_trust
        if low is not None and low < 0:
            found.append(f"{where}.min_trust: must not be negative, is {low}")
        if high is not None and high <= 0:
            found.append(f"{where}.max_trust: must be positive, is {high} (leave out for none)")
        elif low is not None and high is not None and low > high:
            found.append(f"{where}.min_trust: {low} is larger than max_trust {high}")
        return found


OptimizerConfig = Annotated[AdamWConfig | LambConfig, Field(discriminator="kind")]


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
        return _shared_problems(self, where, total_steps) + _decay_problems(self, where)


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
        return _shared_problems(self, where, total_steps) + _decay_problems(self, where)


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
        found = _shared_problems(self, where, total_steps) + _decay_problems(self, where)
        if not found and self.warmup_steps + self.decay_steps > total_steps:
            found.append(
                f"{where}.decay_steps: warm-up ({self.warmup_steps}) and decay "
                f"({self.decay_steps}) do not fit into {total_steps} steps"
            )
        return found


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
        return _shared_problems(self, where, total_steps)


ScheduleConfig = Annotated[
    CosineConfig | LinearConfig | WSDConfig | ConstantConfig, Field(discriminator="kind")
]


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
        found = []
        for name in ("spike_threshold", "grad_norm_threshold"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"{where}.{name}: must be positive, is {value} (leave out for never)")
        if self.window < 4:
            found.append(
                f"{where}.window: a standard deviation needs at least 4 steps, is {self.window}"
            )
        if self.max_skips < 1:
            found.append(f"{where}.max_skips: must be at least 1, is {self.max_skips}")
        return found


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
        found = []
        if self.start_step < 0:
            found.append(f"{where}.start_step: must not be negative, is {self.start_step}")
        if self.num_steps < 1:
            found.append(f"{where}.num_steps: must be at least 1, is {self.num_steps}")
        if not found and self.start_step + self.num_steps > total_steps:
            found.append(
                f"{where}.start_step: steps {self.start_step} to "
                f"{self.start_step + self.num_steps - 1} do not exist in a run of "
                f"{total_steps} steps (0 to {total_steps - 1})"
            )
        return found


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
    return train.steps if train.steps > 0 else sys.maxsize


def _moment_problems(optimizer: AdamWConfig | LambConfig, where: str) -> list[str]:
    found = [
        f"{where}.betas: each must be in [0, 1), is {beta}"
        for beta in optimizer.betas
        if not 0 <= beta < 1
    ]
    if optimizer.eps <= 0:
        found.append(f"{where}.eps: must be positive, is {optimizer.eps}")
    if optimizer.core_lr_factor <= 0:
        found.append(
            f"{where}.core_lr_factor: must be positive, is {optimizer.core_lr_factor} "
            "(1.0 trains cores at the scheduled learning rate)"
        )
    for name in ("weight_decay", "core_weight_decay"):
        value = getattr(optimizer, name)
        if value is not None and value < 0:
            found.append(f"{where}.{name}: must not be negative, is {value}")
    return found


def _shared_problems(
    schedule: CosineConfig | LinearConfig | WSDConfig | ConstantConfig,
    where: str,
    total_steps: int,
) -> list[str]:
    found = []
    if schedule.lr <= 0:
        found.append(f"{where}.lr: must be positive, is {schedule.lr}")
    if schedule.warmup_steps < 0:
        found.append(f"{where}.warmup_steps: must not be negative, is {schedule.warmup_steps}")
    elif schedule.warmup_steps > total_steps:
        found.append(
            f"{where}.warmup_steps: {schedule.warmup_steps} steps of warm-up, "
            f"but the run has only {total_steps} steps"
        )
    return found


def _decay_problems(schedule: CosineConfig | LinearConfig | WSDConfig, where: str) -> list[str]:
    found = []
    if not 0 <= schedule.min_lr_ratio <= 1:
        found.append(f"{where}.min_lr_ratio: must be in [0, 1], is {schedule.min_lr_ratio}")
    if schedule.decay_steps is not None and schedule.decay_steps < 1:
        found.append(f"{where}.decay_steps: must be at least 1, is {schedule.decay_steps}")
    return found
