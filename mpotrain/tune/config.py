"""The file of a fine-tuning run: a pretrained encoder, a task, and how it is trained (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.config import empty_problems, world_problems
from mpotrain.config_file import validate
from mpotrain.engine.config import EngineConfig, LocalConfig, expert_problems, uncut_problems
from mpotrain.engine.config import problems as engine_problems
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import read_layers
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.schema import Check, collect_problems, config
from mpotrain.train.config import TrainConfig
from mpotrain.tune.tasks import FORMATS, GlueTask, TaskFormat, metrics_for

MIN_SEQUENCE = 5
"""Tokens of the shortest sequence: three marks and a token of each of two texts."""


@config
class GlueConfig:
    """A task of GLUE (Wang et al. 2019), its files as they are downloaded."""

    kind: GlueTask
    """Which task."""
    train: str
    """File with the training examples (`train.tsv`)."""
    validation: str
    """File with the examples that are evaluated (`dev.tsv`; of MNLI `dev_matched.tsv`)."""
    mismatched: str | None = None
    """MNLI: examples of genres that are not trained on (`dev_mismatched.tsv`), reported apart."""
    sequence_length: int | None = None
    """Tokens of an example, marks included; longer texts are cut. Absent: all positions that the
    encoder has."""
    max_bad_lines: int = 0
    """Lines of a file that may be unreadable and are left out; with more the start is refused."""

    def format(self) -> TaskFormat:
        """Return columns, classes and metrics."""
        return FORMATS[self.kind]

    def validation_files(self) -> dict[str, str]:
        """Return the files that are evaluated, by the prefix of their metrics."""
        files = {"": self.validation}
        return files if self.mismatched is None else files | {"mismatched_": self.mismatched}

    def problems(self, where: str) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key."""
        return collect_problems(
            *_file_checks(self, where), lambda: self._mismatched_problems(f"{where}.mismatched")
        )

    def _mismatched_problems(self, where: str) -> list[str]:
        if self.mismatched is not None and self.kind != "mnli":
            return [f"{where}: only mnli has such a file; leave it out"]
        if self.mismatched is not None and not self.mismatched.strip():
            return [f"{where}: is empty; name a file, or leave it out"]
        return []


@config
class TsvConfig:
    """A task of one's own: tab-separated columns under a line with their names, no quoting."""

    kind: Literal["tsv"] = "tsv"
    """Tag of this variant."""
    train: str
    """File with the training examples."""
    validation: str
    """File with the examples that are evaluated."""
    text: str
    """Name of the column with the (first) text."""
    pair: str | None = None
    """Name of the column with the second text; absent: there is one text."""
    label: str
    """Name of the column with the class or the number."""
    labels: tuple[str, ...] = ()
    """The classes as they stand in the files; empty: the label is a number (regression)."""
    sequence_length: int | None = None
    """Tokens of an example, marks included; longer texts are cut. Absent: all positions that the
    encoder has."""
    max_bad_lines: int = 0
    """Lines of a file that may be unreadable and are left out; with more the start is refused."""

    def format(self) -> TaskFormat:
        """Return columns, classes and metrics."""
        metrics = metrics_for(len(self.labels))
        return TaskFormat(self.text, self.pair, self.label, self.labels, metrics)

    def validation_files(self) -> dict[str, str]:
        """Return the files that are evaluated, by the prefix of their metrics."""
        return {"": self.validation}

    def problems(self, where: str) -> list[str]:
        """Return every mistake in this section as lines that begin with the dotted key."""
        return collect_problems(
            *_file_checks(self, where),
            *(partial(self._name_problems, where, key) for key in ("text", "pair", "label")),
            lambda: self._column_problems(f"{where}.text"),
            lambda: self._label_problems(f"{where}.labels"),
        )

    def _name_problems(self, where: str, key: str) -> list[str]:
        return [f"{where}.{key}: is empty"] if getattr(self, key) == "" else []

    def _column_problems(self, where: str) -> list[str]:
        columns = [name for name in (self.text, self.pair, self.label) if name is not None]
        if len(set(columns)) == len(columns):
            return []
        return [f"{where}: text, pair and label must be different columns"]

    def _label_problems(self, where: str) -> list[str]:
        if len(self.labels) == 1:
            return [f"{where}: one class alone leaves nothing to learn; name them all"]
        twice = sorted({name for name in self.labels if self.labels.count(name) > 1})
        return [f"{where}: {name!r} is named twice" for name in twice]


TaskConfig = Annotated[GlueConfig | TsvConfig, Field(discriminator="kind")]


@config
class TuneConfig:
    """Everything that defines a fine-tuning run.

    In `train` a sample is an example of the task, and `seed` also decides their order. Evaluations
    always read the whole validation file, so `train.eval_sequences` has no effect; without
    `train.eval_every` there is one at the end.
    """

    name: str
    """Name of the run, shown in logs."""
    folder: str
    """Run folder: checkpoints, metrics, resolved configuration, results."""
    source: str
    """Pretrained encoder: a run folder (its newest checkpoint counts), or one checkpoint. Only the
    first start reads it."""
    task: TaskConfig
    """What is learned: files, columns, classes."""
    train: TrainConfig
    """Steps, batch, optimizer, schedule, policies, intervals."""
    dropout: float = 0.1
    """Dropout before the classifier; that of the encoder is the one it was pretrained with."""
    engine: EngineConfig = LocalConfig()
    """The back end that runs a step."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallel degrees; the world is checked against them."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Interval, retention and verification of checkpoints."""

    def problems(self, world_size: int | None = None) -> list[str]:
        """Return everything that makes the run impossible, one line each, with dotted keys.

        Args:
            world_size: number of processes where it is known.
        """
        return [
            *empty_problems(self, ("name", "folder", "source")),
            *collect_problems(
                lambda: self.task.problems("task"),
                lambda: self.train.problems("train"),
                self._dropout_problems,
                lambda: engine_problems(self.engine, world_size, "engine"),
                self._engine_problems,
                lambda: self.parallel.problems("parallel"),
                lambda: uncut_problems(self.engine, self.parallel),
                lambda: expert_problems(self.engine, self.parallel.expert, None, world_size),
                lambda: self.checkpoint.problems("checkpoint"),
                lambda: world_problems(self, world_size),
            ),
        ]

    def _dropout_problems(self) -> list[str]:
        if 0 <= self.dropout < 1:
            return []
        return [f"dropout: must be in [0, 1), is {self.dropout}"]

    def _engine_problems(self) -> list[str]:
        if self.engine.kind != "megatron":
            return []
        return [
            'engine.kind: "megatron", but that engine cuts the networks of pretraining into '
            "matrices and stages, and not an encoder with a classifier; fine-tune with "
            'engine.kind="deepspeed" or "local"'
        ]


def load_tune_config(path: Path, overrides: Sequence[str] = ()) -> TuneConfig:
    """Read, merge and validate the file of a fine-tuning run.

    Args:
        path: TOML file; may extend others.
        overrides: `dotted.key=value` lines.

    Returns:
        The validated run.

    Raises:
        ConfigError: with every mistake, each with its file and dotted key.
    """
    table = read_layers(path, overrides)
    if "model" in table.data and "task" not in table.data:
        raise ConfigError([f"{path}: is the file of a pretraining run; see `mpotrain train`"])
    return validate(TuneConfig, table)


def _file_checks(task: GlueConfig | TsvConfig, where: str) -> tuple[Check, ...]:
    """Return the checks of the fields that all tasks have, for `collect_problems`."""

    def file(key: str) -> Iterator[str]:
        if not getattr(task, key).strip():
            yield f"{where}.{key}: is empty; name a file"

    def length() -> Iterator[str]:
        if task.sequence_length is not None and task.sequence_length < MIN_SEQUENCE:
            yield (
                f"{where}.sequence_length: is {task.sequence_length} but must be at least "
                f"{MIN_SEQUENCE}: three marks and a token of each text"
            )

    def bad_lines() -> Iterator[str]:
        if task.max_bad_lines < 0:
            yield f"{where}.max_bad_lines: must not be negative, is {task.max_bad_lines}"

    return *(partial(file, key) for key in ("train", "validation")), length, bad_lines
