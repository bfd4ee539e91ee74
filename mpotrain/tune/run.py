"""One start of a fine-tuning run: a pretrained encoder learns a task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpotrain.batch import Batch
from mpotrain.checkpoint.manifest import WEIGHT, Signature
from mpotrain.checkpoint.reader import CheckpointReader
from mpotrain.data.loader import Loader
from mpotrain.durable import write_durably
from mpotrain.engine.statistics import buffer_shapes
from mpotrain.errors import ConfigError
from mpotrain.launch import launch
from mpotrain.models.classifier import Classifier
from mpotrain.nn.roles import Role, role_of
from mpotrain.parallel.ranks import World
from mpotrain.parallel.watchdog import Beat
from mpotrain.start import Start
from mpotrain.train.journal import plain_json
from mpotrain.train.signals import StopRequest
from mpotrain.train.state import Outcome, RunState
from mpotrain.tune.config import TuneConfig
from mpotrain.tune.encoding import ExampleEncoder
from mpotrain.tune.evaluation import TaskEvaluator
from mpotrain.tune.foundation import OpenedFoundation, described, open_foundation
from mpotrain.tune.samples import TaskData, TaskObjective, TaskSamples
from mpotrain.tune.task_file import Examples, read_task_file

RESULTS_FILE = "results.json"
"""Name of the file with the last evaluation of a finished run, in its folder."""


def tune(
    run: TuneConfig,
    *,
    fresh: bool = False,
    profile: bool = False,
    allow_data_change: bool = False,
) -> int:
    """Fine-tune all weights as one rank of a world: from the newest checkpoint, or from the source.

    Args:
        run: the validated run.
        fresh: refuse to go on with what the run folder holds.
        profile: record a few steps even if the run file asks for none.
        allow_data_change: go on although the examples differ from those of the checkpoint.

    Returns:
        The exit code: done, or stopped on request.

    Raises:
        MpotrainError: see the subclasses; the outcome file of the run folder says so too.
    """
    # Without an interval there is one evaluation, at the end.
    every = run.train.eval_every or run.train.steps
    run = replace(run, train=replace(run.train, eval_every=every))

    def build(world: World, stop: StopRequest, stack: ExitStack, beat: Beat) -> Start:
        return TuningStart(run, world, stop, stack, allow_data_change, beat)

    return launch(run, build, fresh=fresh, profile=profile)


class TuningStart(Start):
    """A start on the examples of a task."""

    def __init__(
        self,
        run: TuneConfig,
        world: World,
        stop: StopRequest,
        stack: ExitStack,
        allow_data_change: bool,
        beat: Beat,
    ) -> None:
        """Open the encoder and the examples; see `Start`."""
        self.config, self.form = run, run.task.format()
        self.opened = world.together(lambda: open_foundation(Path(run.source), Path(run.folder)))
        self.foundation = self.opened.foundation
        self.encoder = example_encoder(run, self.opened)
        self.samples = world.together(lambda: self._read(run.task.train))
        self.validation = world.together(
            lambda: {
                prefix: self._read(path) for prefix, path in run.task.validation_files().items()
            }
        )
        self._last: Mapping[str, Any] | None = None
        super().__init__(
            run, self._data(), world, stop, stack, allow_data_change=allow_data_change, beat=beat
        )

    def go(self, fresh: bool, profile: bool) -> tuple[Outcome, RunState]:
        """Take the run up, or begin it, train, and write the results at its end."""
        for samples in (self.samples, *self.validation.values()):
            self._note_bad_lines(samples.examples)
        outcome, state = super().go(fresh, profile)
        if outcome is Outcome.DONE:
            values = self._evaluate() if self._last is None else self._last
            if self.world.is_main:
                self._write_results(state, values)
        return outcome, state

    def build_model(self, *, resumes: bool) -> nn.Module:
        """Build the classifier; its encoder has the weights of the source at the first start."""
        run, foundation = self.config, self.foundation
        model = Classifier(
            foundation.model,
            num_outputs=self.form.num_outputs,
            head_dropout=run.dropout,
            seed=run.train.seed,
            compute_dtype=torch.bfloat16 if run.engine.dtype == "bf16" else torch.float32,
        )
        roles = {role_of(parameter) for parameter in model.parameters()}
        if run.train.central_mask.probability > 0 and Role.CENTRAL not in roles:
            raise ConfigError(
                [
                    f"train.central_mask.probability: {run.train.central_mask.probability}, but "
                    f"the encoder of {foundation.origin} has no central tensor; set it to 0"
                ]
            )
        if not resumes:
            assert self.opened.weights is not None
            load_encoder(model, self.opened.weights)
        return model

    def signatures(self, model: nn.Module) -> Mapping[str, Signature]:
        """Return role and shape of all that a checkpoint holds."""
        found: dict[str, Signature] = {
            name: (str(role_of(parameter)), tuple(parameter.shape))
            for name, parameter in model.named_parameters()
        }
        buffers = buffer_shapes(model).items()
        return found | {name: (str(Role.BUFFER), shape) for name, shape in buffers}

    def microbatches(self) -> Callable[[int], Sequence[Batch]]:
        """Return the function that gives this rank's micro-batches at a data position."""
        config, world = self.config.train, self.world
        loader = Loader(
            self.samples,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            objective=TaskObjective(self.samples.examples, self.encoder),
            rank=world.rank,
            world_size=world.size,
            pin_memory=world.device.type == "cuda",
        )
        return self.stack.enter_context(loader).microbatches

    def evaluator(self) -> Callable[[], Mapping[str, Any]]:
        """Return the evaluation on all validation examples."""
        return self._evaluate

    def tokens_per_sample(self) -> int:
        """Return the tokens that the network reads of an example, padding included."""
        return self.encoder.sequence_length

    def described(self) -> dict[str, Any]:
        """Return the resolved configuration with the encoder, as checkpoints keep it."""
        return super().described() | described(self.foundation)

    def _evaluate(self) -> Mapping[str, Any]:
        evaluator = TaskEvaluator(
            self.engine,
            self.form,
            self.validation,
            self.encoder,
            micro_batch_size=self.config.train.micro_batch_size,
            beat=self.beat,
        )
        self._last = evaluator()
        return self._last

    def _read(self, path: str) -> TaskSamples:
        run = self.config
        examples = read_task_file(Path(path), self.form, run.task.max_bad_lines)
        return TaskSamples(examples, self.encoder.sequence_length, run.train.seed)

    def _data(self) -> TaskData:
        form, foundation = self.form, self.foundation
        settings = {
            "task.columns": list(form.wanted),
            "task.labels": list(form.labels),
            "task.max_bad_lines": self.config.task.max_bad_lines,
            "train.seed": self.config.train.seed,
            "encoder.marks": [foundation.cls_id, foundation.sep_id],
        }
        opened = self.opened
        return TaskData(self.samples, foundation.tokenizer, opened.tokenizer_path, settings)

    def _note_bad_lines(self, examples: Examples) -> None:
        if examples.num_bad:
            self.progress.note(
                f"{examples.path}: {examples.num_bad} unreadable line(s) left out, "
                f"{len(examples):,} examples"
            )

    def _write_results(self, state: RunState, values: Mapping[str, Any]) -> None:
        results = {
            "task": self.config.task.kind,
            "source": self.foundation.origin,
            "step": state.step,
            "num_training_examples": len(self.samples.examples),
            **values,
        }
        text = json.dumps(plain_json(results), indent=2, allow_nan=False)
        write_durably(self.folder / RESULTS_FILE, f"{text}\n".encode())
        shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
        self.progress.note(f"{self.folder / RESULTS_FILE}: {shown}")


def example_encoder(run: TuneConfig, opened: OpenedFoundation) -> ExampleEncoder:
    """Return what turns the examples of a run into tokens.

    Raises:
        ConfigError: the sequences are longer than the encoder's positions.
    """
    foundation = opened.foundation
    longest, wanted = foundation.model.context_length, run.task.sequence_length
    if wanted is not None and wanted > longest:
        raise ConfigError(
            [
                f"task.sequence_length: {wanted} is longer than the {longest} positions of "
                f"{foundation.origin}"
            ]
        )
    return ExampleEncoder(
        opened.tokenizer,
        cls_id=foundation.cls_id,
        sep_id=foundation.sep_id,
        sequence_length=wanted or longest,
        num_token_types=foundation.model.num_token_types,
    )


def load_encoder(model: Classifier, weights: CheckpointReader) -> None:
    """Overwrite the encoder's weights; the layers that a classifier adds stay as they are."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in model.added_parameters:
                tensor.copy_(weights.read(name, (WEIGHT,))[WEIGHT])
