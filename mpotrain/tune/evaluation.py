"""Evaluation of a classifier on whole files, the same for every world."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpotrain.batch import Batch
from mpotrain.data.loader import Loader
from mpotrain.engine.base import Engine, EvalResult
from mpotrain.parallel.watchdog import Beat, beating, no_beat
from mpotrain.tune.encoding import ExampleEncoder
from mpotrain.tune.glue_metrics import Floats, class_metrics, value_metrics
from mpotrain.tune.samples import TaskObjective, TaskSamples
from mpotrain.tune.tasks import TaskFormat


class TaskEvaluator:
    """Evaluates an engine's classifier on all examples of some files."""

    def __init__(
        self,
        engine: Engine,
        form: TaskFormat,
        files: Mapping[str, TaskSamples],
        encoder: ExampleEncoder,
        *,
        micro_batch_size: int,
        beat: Beat = no_beat,
    ) -> None:
        """Prepare the evaluation.

        Args:
            engine: holds a `Classifier`.
            form: classes and metrics of the task.
            files: the examples of each file, by the prefix of its metrics.
            encoder: writes their tokens.
            micro_batch_size: examples of one forward pass.
            beat: told of every batch.
        """
        self._engine, self._form, self._beat = engine, form, beat
        world = engine.world
        self._loaders = {
            prefix: Loader(
                samples,
                global_batch_size=micro_batch_size * world.size,
                micro_batch_size=micro_batch_size,
                objective=TaskObjective(samples.examples, encoder),
                rank=world.rank,
                world_size=world.size,
                prefetch=False,
            )
            for prefix, samples in files.items()
        }

    def __call__(self) -> dict[str, Any]:
        """Evaluate; all ranks call this together and get the same loss, metrics and counts."""
        found: dict[str, Any] = {}
        for prefix, loader in self._loaders.items():
            result, metrics = self._evaluate(loader)
            values = {"loss": result.mean, **metrics, "num_examples": result.num_tokens}
            found |= {f"{prefix}{name}": value for name, value in values.items()}
        return found

    def _evaluate(self, loader: Loader) -> tuple[EvalResult, dict[str, float]]:
        if not self._form.is_regression:
            batches = beating(loader.evaluation_batches(), self._beat, "evaluating")
            result = self._engine.evaluate(batches)
            confusion = result.statistics["confusion"].numpy()
            return result, class_metrics(confusion, self._form.metrics)
        examples = list(loader.evaluation_batches())
        with head_outputs(self._engine.model) as outputs:
            result = self._engine.evaluate(beating(examples, self._beat, "evaluating"))
        predictions, values = self._gather(examples, outputs)
        moments = result.statistics["moments"].numpy()
        return result, value_metrics(moments, predictions, values, self._form.metrics)

    def _gather(self, batches: Sequence[Batch], outputs: list[Tensor]) -> tuple[Floats, Floats]:
        """Return predictions and values of the examples of all ranks, (N,) each.

        Where weights are split, a rank that has run out computes batches of others as well: what
        its model gives after its own batches is not its own.
        """
        mine: list[tuple[Floats, Floats]] = []
        for batch, output in zip(batches, outputs, strict=False):
            real = batch.loss_mask[:, 0]
            mine.append((output[real, 0].double().numpy(), batch.targets[real, 0].double().numpy()))
        everything = [pair for pairs in self._engine.world.gather_objects(mine) for pair in pairs]
        return (
            np.concatenate([prediction for prediction, _ in everything]),
            np.concatenate([value for _, value in everything]),
        )


@contextmanager
def head_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the last layer of a classifier gives inside the block, on the host."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        del module, inputs
        outputs.append(output.detach().to("cpu", torch.float32))

    handle = model.get_submodule("classifier").register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
