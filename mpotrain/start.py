"""One start of a run, whatever it trains: taken up where it stands, trained, recorded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpotrain.assemble import build_engine
from mpotrain.batch import Batch
from mpotrain.checkpoint.compare import config_differences, require_model, require_network
from mpotrain.checkpoint.manifest import Manifest, Signature
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.config import RunSettings
from mpotrain.data.dataset import changes
from mpotrain.errors import CheckpointError, ConfigError, DataError
from mpotrain.nn.spectra import model_spectra
from mpotrain.parallel.grid import grid_text, rank_grid
from mpotrain.parallel.ranks import World, set_collective_timeout
from mpotrain.parallel.watchdog import Beat, beating, collective_timeout, no_beat
from mpotrain.run_record import CHECKPOINTS, TrainingData, position_of, record_start
from mpotrain.schema import to_dict
from mpotrain.train.anomaly import AnomalyGuard
from mpotrain.train.config import ProfileConfig
from mpotrain.train.loop import LoopParts, TrainingLoop
from mpotrain.train.metrics import MetricsWriter, Throughput
from mpotrain.train.profiler import StepProfiler
from mpotrain.train.progress import Progress
from mpotrain.train.signals import StopRequest
from mpotrain.train.state import Outcome, RunState


class Start(ABC):
    """One start of a run on one rank: everything that is built and must be closed again.

    Subclasses say what is trained on what; how a run is taken up, saved and recorded is the same
    for all.

    Attributes:
        run: the validated run.
        world: the ranks.
        data: what is trained on.
        progress: what a person sees.
        has_begun: whether the run folder was touched.
        beat: to be told of progress in everything that takes long.
    """

    def __init__(
        self,
        run: RunSettings,
        data: TrainingData,
        world: World,
        stop: StopRequest,
        stack: ExitStack,
        *,
        allow_data_change: bool = False,
        beat: Beat = no_beat,
    ) -> None:
        """Prepare a start; nothing is written yet.

        Args:
            run: the validated run.
            data: what is trained on.
            world: the ranks.
            stop: requests to stop.
            stack: closes what is opened here.
            allow_data_change: go on although the data differ from those of the checkpoint.
            beat: told of all progress.
        """
        self.run, self.data, self.world, self.stop, self.stack = run, data, world, stop, stack
        self.has_begun = False
        self.beat = beat
        self.folder = Path(run.folder)
        self._allow_data_change = allow_data_change
        self.store = CheckpointStore(
            self.folder / CHECKPOINTS, run.checkpoint, world,
            on_point=lambda name: beat(f"checkpoint ({name})"),
        )  # fmt: skip
        stack.callback(self.store.close)
        self.guard = AnomalyGuard(run.train.anomaly)
        self.progress = Progress(run.train.steps, is_main=world.is_main, every=run.train.log_every)

    @abstractmethod
    def build_model(self, *, resumes: bool) -> nn.Module:
        """Build the network with its start weights.

        Args:
            resumes: a checkpoint will replace all weights.
        """

    @abstractmethod
    def signatures(self, model: nn.Module) -> Mapping[str, Signature]:
        """Return role and global shape of all that a checkpoint holds."""

    @abstractmethod
    def microbatches(self) -> Callable[[int], Sequence[Batch]]:
        """Return the function that gives this rank's micro-batches at a data position."""

    @abstractmethod
    def evaluator(self) -> Callable[[], Mapping[str, Any]] | None:
        """Return the function that evaluates (collective); None where nothing is evaluated."""

    def described(self) -> dict[str, Any]:
        """Return the resolved configuration as checkpoints keep it."""
        return to_dict(self.run)

    def throughput(self) -> Throughput:
        """Return what measures the speed."""
        return Throughput()

    def mixtures(self) -> Sequence[str]:
        """Return the names of the mixtures of experts."""
        return ()

    def tokens_per_sample(self) -> int | None:
        """Return the tokens of a sample by which speed is measured; None = targets."""
        return None

    def bytes_per_token(self) -> float | None:
        """Return the bytes of text of a target; None where that means nothing."""
        return None

    def go(self, fresh: bool, profile: bool) -> tuple[Outcome, RunState]:
        """Take the run up, or begin it, and train.

        Args:
            fresh: refuse to go on with what the run folder holds.
            profile: record a few steps even if the run file asks for none.
        """
        run = self.run
        self.beat("looking for checkpoints")
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
            self._check_kind(manifest)
            self._check_data(manifest)
        self.beat("building the model", 0 if manifest is None else manifest.step)
        model = self.build_model(resumes=manifest is not None)
        signatures = self.signatures(model)
        if manifest is not None:
            require_model(manifest, signatures, self.described())
            require_network(manifest, self.described().get("model", {}))
        self.beat("building the engine")
        self.engine = build_engine(run, model, self.world)
        self.stack.callback(self.engine.close)
        set_collective_timeout(self.world, collective_timeout(run.train.hang_timeout_seconds))
        grid = rank_grid(self.world.parallel, self.world.size)
        if self.world.parallel.model_ranks > 1 and grid is not None:
            self.progress.note(grid_text(grid))
        state = RunState() if manifest is None else self._resume(manifest)
        self.has_begun = True
        self.world.together(lambda: self._record(state.step))
        resume_step = None if manifest is None else state.step
        parts = self.world.together(lambda: self._parts(profile, resume_step))
        return TrainingLoop(run.train, run.checkpoint.every, parts).run(state)

    def _record(self, step: int) -> None:
        if self.world.is_main:
            record_start(self.run, self.world, step, self.data.tokenizer_path)

    def _check_kind(self, manifest: Manifest) -> None:
        """Refuse to pretrain where a fine-tuning run lies, and the other way round."""
        theirs, ours = ("task" in config for config in (manifest.run.config, self.described()))
        if theirs != ours:
            kinds = {True: "a fine-tuning run (`mpotrain tune`)", False: "a pretraining run"}
            raise CheckpointError(
                f"{self.folder}: holds {kinds[theirs]}, but this is {kinds[ours]}; choose another "
                "folder"
            )

    def _check_data(self, manifest: Manifest) -> None:
        if manifest.run.data_fingerprint == self.data.digest:
            return
        before = manifest.run.train_state.get("data", {})
        lines = "\n".join(f"  {line}" for line in changes(before, self.data.fingerprint))
        text = (
            f"the data are not those of the checkpoint of step {manifest.step}: what is "
            f"trained on would not go on as it was\n{lines}"
        )
        if not self._allow_data_change:
            raise DataError(f"{text}\nrestore them, or go on with --allow-data-change")
        self.progress.note(text)

    def _resume(self, manifest: Manifest) -> RunState:
        reader = self.store.open(manifest.step)
        saved = manifest.run
        counters = saved.train_state.get("counters")

        def read(name: str) -> dict[str, Tensor]:
            self.beat("reading a checkpoint")
            return reader.read(name)

        self.engine.import_state(read, saved.num_updates, counters)
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
        for line in config_differences(saved.config, self.described()):
            note(f"  changed since: {line}")
        return state

    def _save(self, state: RunState) -> None:
        run = self.run
        engine: dict[str, Any] = {"kind": run.engine.kind, "world_size": self.world.size}
        engine |= {"dtype": run.engine.dtype, "zero_stage": getattr(run.engine, "zero_stage", None)}
        engine |= {"expert_ranks": run.parallel.expert}
        counters = {"anomaly": self.guard.state_dict(), "counters": self.engine.counters()}
        position = position_of(run, self.data, state, counters, engine)
        tensors = beating(self.engine.export_state(), self.beat, "saving a checkpoint")
        self.store.save(replace(position, config=self.described()), tensors)

    def _parts(self, profile: bool, resume_step: int | None) -> LoopParts:
        run, world, stack = self.run, self.world, self.stack
        config = run.train
        microbatches = self.microbatches()
        metrics = MetricsWriter(
            self.folder, is_main=world.is_main, tensorboard=config.tensorboard,
            resume_step=resume_step,
        )  # fmt: skip
        stack.callback(metrics.close)
        chosen = config.profile or (default_profile(config.steps) if profile else None)
        return LoopParts(
            engine=self.engine,
            microbatches=microbatches,
            guard=self.guard,
            metrics=metrics,
            progress=self.progress,
            throughput=self.throughput(),
            stop=self.stop,
            profiler=StepProfiler(chosen, self.folder, rank=world.rank, device=world.device),
            save=self._save,
            evaluate=self.evaluator(),
            spectra=self._spectra,
            bytes_per_token=self.bytes_per_token(),
            mixtures=self.mixtures(),
            tokens_per_sample=self.tokens_per_sample(),
            beat=self.beat,
        )

    def _spectra(self) -> Mapping[str, Any]:
        with self.engine.full_parameters():
            if not self.world.is_main:
                return {}
            return spectra_metrics(self.engine.model)


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
