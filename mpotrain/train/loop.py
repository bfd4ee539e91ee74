"""The training loop: the order in which the parts of a run do their work.

Everything clever lives elsewhere: the engine makes a step, the loader is a function of the data
position, the schedule of the step, the guard judges, the store saves. The loop has no state that
a checkpoint does not hold, and it does not know which engine it drives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import log
from typing import Any

from mpotrain.batch import Batch
from mpotrain.engine.base import Engine, StepResult
from mpotrain.engine.counts import pair_metrics
from mpotrain.parallel.watchdog import Beat, no_beat
from mpotrain.train.anomaly import AnomalyGuard
from mpotrain.train.config import TrainConfig
from mpotrain.train.metrics import MetricsWriter, Rate, Throughput, peak_memory
from mpotrain.train.profiler import StepProfiler
from mpotrain.train.progress import Progress, StepReport
from mpotrain.train.router_metrics import load_histograms, router_metrics
from mpotrain.train.schedule import learning_rate
from mpotrain.train.signals import StopReason, StopRequest
from mpotrain.train.state import Outcome, RunState


@dataclass(frozen=True)
class LoopParts:
    """What the loop drives; all are built by the caller.

    Attributes:
        engine: makes steps.
        microbatches: this rank's micro-batches at a data position.
        guard: judges every step before its update.
        metrics: journal and TensorBoard.
        progress: live line.
        throughput: tokens per second.
        stop: requests to stop.
        profiler: traces of some steps.
        save: writes a checkpoint of a state (collective).
        evaluate: held-out loss as metrics (collective), None where there is nothing to evaluate.
        spectra: norms and entropies of the cores as metrics (collective).
        bytes_per_token: of the training text, None where unknown.
        mixtures: names of the mixtures of experts, in the order of the rows of
            `StepResult.statistics`; their routers are reported where there are any.
        tokens_per_sample: tokens of a sample by which speed is measured; None = the targets that
            count in the loss (all of them in next-token prediction, few of them elsewhere).
        beat: told of all progress.
    """

    engine: Engine
    microbatches: Callable[[int], Sequence[Batch]]
    guard: AnomalyGuard
    metrics: MetricsWriter
    progress: Progress
    throughput: Throughput
    stop: StopRequest
    profiler: StepProfiler
    save: Callable[[RunState], None]
    evaluate: Callable[[], Mapping[str, Any]] | None
    spectra: Callable[[], Mapping[str, Any]]
    bytes_per_token: float | None
    mixtures: Sequence[str] = ()
    tokens_per_sample: int | None = None
    beat: Beat = no_beat


class TrainingLoop:
    """Runs steps until the end, a request to stop, or the anomaly policy ends the run."""

    def __init__(self, config: TrainConfig, checkpoint_every: int, parts: LoopParts) -> None:
        """Prepare the loop.

        Args:
            config: steps, batch, schedule and intervals.
            checkpoint_every: steps between two checkpoints.
            parts: what the loop drives.
        """
        self._config, self._checkpoint_every, self._parts = config, checkpoint_every, parts
        self._saved_step = -1
        self._last_step = min(config.steps, config.stop_after or config.steps)

    def run(self, state: RunState) -> tuple[Outcome, RunState]:
        """Train from `state` on; all ranks call this together.

        Returns:
            How the run ended and where it stands. The state returned has been saved.

        Raises:
            AnomalyError: the policy stops the run; the last checkpoint is the newest one.
            StorageError: a checkpoint or a metric could not be written.
        """
        parts = self._parts
        self._saved_step = state.step if state.step else -1
        with ExitStack() as stack:
            for part in (parts.stop, parts.progress, parts.profiler):
                stack.enter_context(part)
            while state.step < self._last_step:
                parts.beat("between steps", state.step)
                reason = StopReason(parts.engine.world.agree(parts.stop.requested()))
                if reason is not StopReason.NONE:
                    # Every rank knows now why the run stops, whichever was asked.
                    parts.stop.request(reason)
                    parts.progress.note(f"stopping at step {state.step}: {reason.text}")
                    self._save(state)
                    return Outcome.STOPPED, state
                state = self._step(state)
            self._save(state)
        done = state.step >= self._config.steps
        return Outcome.DONE if done else Outcome.HELD, state

    def _step(self, state: RunState) -> RunState:
        config, parts = self._config, self._parts
        lr = learning_rate(config.schedule, state.step, config.steps)
        log_due = self._due(state.step + 1, config.log_every)
        parts.beat(f"step {state.step + 1}", state.step)
        parts.profiler.before_step(state.step)
        result = parts.engine.step(
            parts.microbatches(state.consumed_samples),
            lr=lr,
            step=state.step,
            guard=parts.guard,
            detail=log_due,
        )
        parts.profiler.after_step(state.step)
        own = parts.tokens_per_sample
        read = result.num_tokens if own is None else own * config.global_batch_size
        parts.throughput.step_done(read)
        state = state.after(result, config.global_batch_size)
        parts.beat("between steps", state.step)
        with parts.throughput.excluded():
            self._report(state, result, lr, log_due)
            parts.guard.check()
            self._between_steps(state)
        return state

    def _between_steps(self, state: RunState) -> None:
        """Evaluate, look at the cores and save, where one of them is due."""
        config, parts = self._config, self._parts
        if parts.evaluate is not None and self._due(state.step, config.eval_every):
            parts.beat("evaluating")
            values = parts.evaluate()
            parts.metrics.write(state.step, values, kind="eval")
            shown = ", ".join(
                f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float)
            )
            parts.progress.note(f"step {state.step} validation: {shown}")
        if config.spectra_every is not None and self._due(state.step, config.spectra_every):
            parts.beat("measuring spectra")
            parts.metrics.write(state.step, parts.spectra(), kind="spectra")
        if state.step % self._checkpoint_every == 0:
            self._save(state)

    def _report(self, state: RunState, result: StepResult, lr: float, log_due: bool) -> None:
        parts = self._parts
        per_byte = parts.bytes_per_token
        report = StepReport(
            step=state.step,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            bits_per_byte=result.loss / log(2) / per_byte if per_byte else None,
            skipped=result.reason,
        )
        if log_due or result.skipped:
            rate = parts.throughput.take()
            report = replace(
                report,
                tokens_per_second=rate and rate.tokens_per_second,
                seconds_per_step=rate and rate.seconds_per_step,
                mfu=rate and rate.mfu,
                memory_bytes=peak_memory(parts.engine.world.device),
            )
            values = _metrics(report, result, state, parts.guard) | _measured(rate)
            values |= pair_metrics(result.statistics)
            parts.metrics.write(state.step, values)
            self._report_routers(state.step, result)
        parts.progress.update(report)

    def _report_routers(self, step: int, result: StepResult) -> None:
        names, sums, metrics = self._parts.mixtures, result.statistics, self._parts.metrics
        if names and sums:
            loads = load_histograms(sums, names)
            metrics.write(step, router_metrics(sums, names), kind="router", histograms=loads)

    def _save(self, state: RunState) -> None:
        if self._saved_step == state.step:
            return
        self._parts.beat("saving a checkpoint")
        self._parts.metrics.flush()
        self._parts.save(state)
        self._saved_step = state.step

    def _due(self, step: int, every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == self._config.steps)


def _measured(rate: Rate | None) -> dict[str, Any]:
    """Return tokens and time behind `tokens_per_second`, so that lines can be added up."""
    if rate is None:
        return {}
    return {"measured_tokens": rate.num_tokens, "measured_seconds": rate.seconds}


def _metrics(
    report: StepReport, result: StepResult, state: RunState, guard: AnomalyGuard
) -> dict[str, Any]:
    return {
        "loss": report.loss,
        "bits_per_byte": report.bits_per_byte,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "grad_norm_by_role": result.grad_norm_by_role,
        "tokens_per_second": report.tokens_per_second,
        "mfu": report.mfu,
        "memory_bytes": report.memory_bytes,
        "tokens": state.tokens,
        "consumed_samples": state.consumed_samples,
        "skipped": result.reason,
        "num_skipped": guard.num_skipped,
    }
