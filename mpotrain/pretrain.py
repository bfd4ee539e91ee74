"""Pretraining: one start of a run on prepared token shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mpotrain.assemble import build_model, model_signatures, open_data
from mpotrain.batch import Batch
from mpotrain.checkpoint.manifest import Signature
from mpotrain.config import RunConfig
from mpotrain.data.loader import Loader
from mpotrain.data.objective import open_objective
from mpotrain.evaluate import Evaluator
from mpotrain.launch import launch
from mpotrain.parallel.ranks import World
from mpotrain.parallel.watchdog import Beat
from mpotrain.start import Start
from mpotrain.train.metrics import Throughput
from mpotrain.train.signals import StopRequest

PEAK_FLOPS = {
    "h200": {"bf16": 989.5e12, "fp32": 66.9e12},
    "h100": {"bf16": 989.5e12, "fp32": 66.9e12},
    "a100": {"bf16": 312e12, "fp32": 19.5e12},
}
"""Dense peak FLOP/s of the data sheets (SXM), by part of the device's name; fp32 without TF32."""


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

    def build(world: World, stop: StopRequest, stack: ExitStack, beat: Beat) -> Start:
        return PretrainingStart(run, world, stop, stack, allow_data_change, beat)

    return launch(run, build, fresh=fresh, profile=profile)


class PretrainingStart(Start):
    """A start on the token streams that `mpotrain prepare` wrote."""

    def __init__(
        self,
        run: RunConfig,
        world: World,
        stop: StopRequest,
        stack: ExitStack,
        allow_data_change: bool,
        beat: Beat,
    ) -> None:
        """Open the data; see `Start`."""
        self.config = run
        self.dataset = world.together(lambda: open_data(run, "train"))
        self.validation = (
            world.together(lambda: open_data(run, "validation")) if run.train.eval_every else None
        )
        super().__init__(
            run, self.dataset, world, stop, stack, allow_data_change=allow_data_change, beat=beat
        )

    def build_model(self, *, resumes: bool) -> nn.Module:
        """Build the network of the run with its start weights."""
        del resumes
        config = self.config
        return build_model(config.model, seed=config.train.seed, dtype=config.engine.dtype)

    def signatures(self, model: nn.Module) -> Mapping[str, Signature]:
        """Return role and global shape of all that a checkpoint holds."""
        return model_signatures(model, self.config)

    def microbatches(self) -> Callable[[int], Sequence[Batch]]:
        """Return the function that gives this rank's micro-batches at a data position."""
        config, world = self.config.train, self.world
        loader = self.stack.enter_context(
            Loader(
                self.dataset,
                objective=open_objective(self.dataset),
                global_batch_size=config.global_batch_size,
                micro_batch_size=config.micro_batch_size,
                rank=world.data_rank,
                world_size=world.data_size,
                pin_memory=world.device.type == "cuda",
            )
        )
        return loader.microbatches

    def evaluator(self) -> Callable[[], Mapping[str, Any]] | None:
        """Return the evaluation on the validation split; None where none is asked for."""
        if self.validation is None:
            return None
        evaluator = Evaluator(
            self.engine, self.validation,
            micro_batch_size=self.config.train.micro_batch_size,
            num_sequences=self.config.train.eval_sequences,
            beat=self.beat,
        )  # fmt: skip
        return lambda: evaluator().to_json()

    def throughput(self) -> Throughput:
        """Return what measures the speed, with the utilisation of known devices."""
        return Throughput(
            flops_per_token=self.config.model.flops_per_token(self.config.sample_lengths()),
            peak_flops=peak_flops(self.config, self.world),
        )

    def tokens_per_sample(self) -> int | None:
        """Return the tokens that the network reads of a sample where few are predicted."""
        if self.config.data.objective.kind == "causal":
            return None
        return self.config.sample_lengths().inputs

    def bytes_per_token(self) -> float | None:
        """Return the bytes of text of a token, where the loss is that of the whole text."""
        if self.config.data.objective.kind != "causal":
            return None
        return self.dataset.bytes_per_token

    def mixtures(self) -> Sequence[str]:
        """Return the names of the mixtures of experts."""
        return self.config.model.mixtures()


def peak_flops(run: RunConfig, world: World) -> float | None:
    """Return the peak FLOP/s of all devices together, None on devices without a known peak."""
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device).lower()
    peak = next((peaks for known, peaks in PEAK_FLOPS.items() if known in name), None)
    return None if peak is None else world.size * peak[run.engine.dtype]
