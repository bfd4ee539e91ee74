"""One start of a pretraining run: built, taken up from its newest checkpoint, trained, recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpotrain.assemble import (
    build_engine,
    build_model,
    model_signatures,
    open_data,
    prepare_torch,
)
from mpotrain.checkpoint.compare import config_differences, require_model
from mpotrain.checkpoint.manifest import Manifest, RngRule
from mpotrain.checkpoint.manifest import RunState as SavedState
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.config import RunConfig
from mpotrain.data.dataset import BlendedDataset, changes
from mpotrain.data.loader import Loader
from mpotrain.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    ConfigError,
    DataError,
    ParallelError,
    StorageError,
)
from mpotrain.evaluate import Evaluator
from mpotrain.nn.spectra import model_spectra
from mpotrain.parallel.environment import resolve_environment
from mpotrain.parallel.ranks import World, close_world, init_world
from mpotrain.parallel.watch import watch_parent
from mpotrain.run_record import record_outcome, record_start
from mpotrain.schema import to_dict
from mpotrain.train.anomaly import AnomalyGuard
from mpotrain.train.config import ProfileConfig
from mpotrain.train.loop import LoopParts, TrainingLoop
from mpotrain.train.metrics import MetricsWriter, Throughput
from mpotrain.train.profiler import StepProfiler
from mpotrain.train.progress import Progress
from mpotrain.train.signals import StopReason, StopRequest
from mpotrain.train.state import Outcome, RunState

PEAK_FLOPS = {
    "h200": {"bf16": 989.5e12, "fp32": 66.9e12},
    "h100": {"bf16": 989.5e12, "fp32": 66.9e12},
    "a100": {"bf16": 312e12, "fp32": 19.5e12},
}
"""Dense peak FLOP/s of the data sheets (SXM), by part of the device's name; fp32 without TF32."""
RNG_RULE = "splitmix64(seed, step, microbatch)"
CHECKPOINTS = "checkpoints"


def train(
    run: RunConfig,
    *,
    fresh: bool = False,
    profile: bool = False,
    allow_data_change: bool = False,
) -> int:
    """Train a run as one rank of its world: from the newest checkpoint, or from the start.

    Args:
        run: the validated run.
        fresh: refuse to go on with what the run folder holds.
        profile: record a few steps even if the run file asks for none.
        allow_data_change: go on although the data differ from those of the checkpoint.

    Returns:
        The exit code: done, or stopped on request.

    Raises:
        MpotrainError: see the subclasses; the outcome file of the run folder says so too.
    """
    prepare_torch(run)
    ranks = resolve_environment(os.environ)
    if problems := run.problems(ranks.size):
        raise ConfigError([f"with {ranks.size} process(es): {problem}" for problem in problems])
    limit = run.train.time_limit_minutes
    stop = StopRequest(
        Path(run.folder),
        time_limit_seconds=None if limit is None else 60 * limit,
        watch_file=ranks.rank == 0,
    )
    # Signals count from here on: one that comes while the model is built or a checkpoint is read
    # stops the run at its first step instead of killing it.
    with stop:
        world = init_world(run.engine.kind, run.engine.device, ranks=ranks)
        try:
            return _train(run, world, stop, fresh, profile, allow_data_change)
        finally:
            close_world(world)


def _train(
    run: RunConfig,
    world: World,
    stop: StopRequest,
    fresh: bool,
    profile: bool,
    allow_data_change: bool,
) -> int:
    folder = Path(run.folder)
    start: _Start | None = None
    try:
        with ExitStack() as stack:
            start = _Start(run, world, stop, stack, allow_data_change)
            outcome, state = start.go(fresh, profile)
    except Exception as error:
        lost_peer = world.size > 1 and _is_lost_peer(error)
        # A start that was refused must not mark a run that it has not touched.
        if world.is_main and start is not None and start.has_begun:
            with suppress(StorageError):
                if lost_peer:
                    record_outcome(folder, Outcome.STOPPED, "another rank was lost")
                else:
                    record_outcome(folder, "failed", f"{type(error).__name__}: {error}")
        if lost_peer:
            raise ParallelError(
                f"the connection to another rank broke, which has failed or was killed; its own "
                f"log says why ({error})"
            ) from error
        raise
    if world.is_main:
        record_outcome(folder, outcome, f"step {state.step}")
    start.progress.note(f"{outcome}: {run.name} at step {state.step:,} of {run.train.steps:,}")
    return EXIT_STOPPED if outcome is Outcome.STOPPED else EXIT_DONE


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone (gloo has no type for it)."""
    if isinstance(error, torch.distributed.DistBackendError):
        return True
    signs = ("closed by peer", "Connection reset", "Connection refused", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class _Start:
    """One start of a run on one rank: everything that `train` builds and must close again."""

    def __init__(
        self,
        run: RunConfig,
        world: World,
        stop: StopRequest,
        stack: ExitStack,
        allow_data_change: bool,
    ) -> None:
        self.run, self.world, self.stop, self.stack = run, world, stop, stack
        self.has_begun = False
        self.folder = Path(run.folder)
        self.allow_data_change = allow_data_change
        self.dataset = world.together(lambda: open_data(run, "train"))
        self.validation = (
            world.together(lambda: open_data(run, "validation")) if run.train.eval_every else None
        )
        self.store = CheckpointStore(self.folder / CHECKPOINTS, run.checkpoint, world)
        stack.callback(self.store.close)
        self.guard = AnomalyGuard(run.train.anomaly)
        self.progress = Progress(run.train.steps, is_main=world.is_main, every=run.train.log_every)

    def go(self, fresh: bool, profile: bool) -> tuple[Outcome, RunState]:
        run = self.run
        self.store.claim()
        manifest = self.store.latest()
        if fresh and manifest is not None:
            raise ConfigError(
                [
                    f"--fresh: {self.folder} already holds a run at step {manifest.step}; choose "
                    "another folder (folder=...), or move it away"
                ]
            )
        if manifest is not None:
            self._check_data(manifest)
        model = build_model(run.model, seed=run.train.seed, dtype=run.engine.dtype)
        signatures = model_signatures(model, run)
        if manifest is not None:
            require_model(manifest, signatures, to_dict(run))
        self.engine = build_engine(run, model, self.world)
        self.stack.callback(self.engine.close)
        state = RunState() if manifest is None else self._resume(manifest)
        self.has_begun = True
        self.world.together(lambda: self._record(state.step))
        resume_step = None if manifest is None else state.step
        parts = self.world.together(lambda: self._parts(profile, resume_step))
        return TrainingLoop(run.train, run.checkpoint.every, parts).run(state)

    def _record(self, step: int) -> None:
        if self.world.is_main:
            record_start(self.run, self.world, step, self.dataset.tokenizer_path)

    def _check_data(self, manifest: Manifest) -> None:
        if manifest.run.data_fingerprint == self.dataset.digest:
            return
        before = manifest.run.train_state.get("data", {})
        lines = "\n".join(f"  {line}" for line in changes(before, self.dataset.fingerprint))
        text = (
            f"the data are not those of the checkpoint of step {manifest.step}: samples would be "
            f"repeated or skipped\n{lines}"
        )
        if not self.allow_data_change:
            raise DataError(f"{text}\nrestore them, or go on with --allow-data-change")
        self.progress.note(text)

    def _resume(self, manifest: Manifest) -> RunState:
        reader = self.store.open(manifest.step)
        saved = manifest.run
        counters = saved.train_state.get("counters")
        self.engine.import_state(reader.read, saved.num_updates, counters)
        self.guard.load_state_dict(saved.train_state["anomaly"])
        state = RunState(
            step=saved.step,
            consumed_samples=saved.consumed_samples,
            num_updates=saved.num_updates,
            tokens=int(saved.train_state["tokens"]),
        )
        note = self.progress.note
        if state.step > self.run.train.steps:
            note(f"the run is already beyond train.steps={self.run.train.steps}: nothing to do")
        note(
            f"resuming {self.run.name} at step {state.step:,} of {self.run.train.steps:,}, "
            f"sample {state.consumed_samples:,}, {state.tokens:,} tokens"
        )
        for step, problems in self.store.rejected.items():
            note(f"  checkpoint of step {step} ignored: {'; '.join(problems[:3])}")
        for line in config_differences(saved.config, to_dict(self.run)):
            note(f"  changed since: {line}")
        return state

    def _save(self, state: RunState) -> None:
        run = self.run
        engine: dict[str, Any] = {"kind": run.engine.kind, "world_size": self.world.size}
        engine |= {"dtype": run.engine.dtype, "zero_stage": getattr(run.engine, "zero_stage", None)}
        engine |= {"expert_ranks": run.parallel.expert}
        counters = {"anomaly": self.guard.state_dict(), "counters": self.engine.counters()}
        position = position_of(run, self.dataset, state, counters, engine)
        self.store.save(position, self.engine.export_state())

    def _parts(self, profile: bool, resume_step: int | None) -> LoopParts:
        run, world, stack = self.run, self.world, self.stack
        config = run.train
        loader = stack.enter_context(
            Loader(
                self.dataset,
                global_batch_size=config.global_batch_size,
                micro_batch_size=config.micro_batch_size,
                rank=world.rank,
                world_size=world.size,
                pin_memory=world.device.type == "cuda",
            )
        )
        metrics = MetricsWriter(
            self.folder, is_main=world.is_main, tensorboard=config.tensorboard,
            resume_step=resume_step,
        )  # fmt: skip
        stack.callback(metrics.close)
        stop = self.stop
        if world.size > 1:
            stack.enter_context(watch_parent(lambda: stop.request(StopReason.LAUNCHER_DIED)))
        chosen = config.profile or (default_profile(config.steps) if profile else None)
        return LoopParts(
            engine=self.engine,
            microbatches=loader.microbatches,
            guard=self.guard,
            metrics=metrics,
            progress=self.progress,
            throughput=Throughput(
                flops_per_token=run.model.flops_per_token(run.data.sequence_length),
                peak_flops=peak_flops(run, world),
            ),
            stop=stop,
            profiler=StepProfiler(chosen, self.folder, rank=world.rank, device=world.device),
            save=self._save,
            evaluate=self._evaluator(),
            spectra=self._spectra,
            bytes_per_token=self.dataset.bytes_per_token,
            mixtures=run.model.mixtures(),
        )

    def _evaluator(self) -> Any:
        if self.validation is None:
            return None
        evaluator = Evaluator(
            self.engine, self.validation,
            micro_batch_size=self.run.train.micro_batch_size,
            num_sequences=self.run.train.eval_sequences,
        )  # fmt: skip
        return lambda: evaluator().to_json()

    def _spectra(self) -> Mapping[str, Any]:
        with self.engine.full_parameters():
            if not self.world.is_main:
                return {}
            return spectra_metrics(self.engine.model)


def position_of(
    run: RunConfig,
    dataset: BlendedDataset,
    state: RunState,
    counters: Mapping[str, Any],
    engine: Mapping[str, Any],
) -> SavedState:
    """Return what a checkpoint says of a run beside its tensors.

    Args:
        run: the resolved run.
        dataset: its training data.
        state: where it stands.
        counters: state of the anomaly guard (`anomaly`), counters of the engine (`counters`).
        engine: what wrote the checkpoint, for people.
    """
    return SavedState(
        step=state.step,
        consumed_samples=state.consumed_samples,
        num_updates=state.num_updates,
        config=to_dict(run),
        data_fingerprint=dataset.digest,
        rng=RngRule(seed=run.train.seed, rule=RNG_RULE),
        engine=dict(engine),
        train_state={
            "tokens": state.tokens,
            "data": dataset.fingerprint,
            "tokenizer": to_dict(dataset.tokenizer),
            **counters,
        },
    )


def spectra_metrics(model: nn.Module) -> dict[str, Any]:
    """Return norms and normalised entropies of all cores, and how far experts differ."""
    norms: dict[str, float] = {}
    entropies: dict[str, float] = {}
    spreads: dict[str, float] = {}
    weights: dict[str, float] = {}
    for site in model_spectra(model):
        weights[site.name] = site.weight_norm
        if site.num_experts:
            spreads[site.name] = site.expert_spread
        norms |= {f"{site.name}.cores.{k}": norm for k, norm in enumerate(site.norms)}
        entropies |= {f"{site.name}.bond.{k}": v for k, v in enumerate(site.normalised, start=1)}
    found = {"core_norm": norms, "bond_entropy": entropies, "weight_norm": weights}
    return found | {"expert_spread": spreads} if spreads else found


def default_profile(steps: int) -> ProfileConfig:
    """Return what `--profile` records: three steps after the warm-up, fewer in a short run."""
    return ProfileConfig(start_step=min(10, max(steps - 3, 0)), num_steps=min(3, steps))


def peak_flops(run: RunConfig, world: World) -> float | None:
    """Return the peak FLOP/s of all devices together, None on devices without a known peak."""
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device).lower()
    peak = next((peaks for known, peaks in PEAK_FLOPS.items() if known in name), None)
    return None if peak is None else world.size * peak[run.engine.dtype]
