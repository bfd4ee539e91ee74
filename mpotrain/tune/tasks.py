"""Classification tasks: how their files look and what is measured (no torch).

The tasks of GLUE (Wang et al. 2019) are described as their downloads are: tab-separated UTF-8 text
without any quoting, most with a line of column names, CoLA without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
"""What is measured on the validation examples; see `mpotrain.tune.glue_metrics`."""
GlueTask = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
"""The nine tasks of GLUE."""


@dataclass(frozen=True)
class TaskFormat:
    """Columns, classes and metrics of a task.

    Attributes:
        columns: names of all columns of a file without a line of names; None where the first line
            names them, in any order.
        text: column of the (first) text.
        pair: column of the second text; None where there is one text.
        label: column of the class or the value.
        labels: texts of the classes in the file; class k is `labels[k]`. Empty: the label is a
            number and the task is a regression.
        metrics: what is reported beside the loss, the most important one first.
    """

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...]
    columns: tuple[str, ...] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether a number is predicted instead of a class."""
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """Number of classes; 1 for a regression."""
        return len(self.labels) or 1

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(c for c in (self.text, self.pair, self.label) if c is not None)


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")

FORMATS: dict[str, TaskFormat] = {
    "cola": TaskFormat(
        "sentence", None, "label", BINARY, ("matthews", "accuracy"),
        columns=("source", "label", "mark", "sentence"),
    ),
    "sst2": TaskFormat("sentence", None, "label", BINARY, ("accuracy",)),
    "mrpc": TaskFormat("#1 String", "#2 String", "Quality", BINARY, ("f1", "accuracy")),
    "stsb": TaskFormat("sentence1", "sentence2", "score", (), ("pearson", "spearman")),
    "qqp": TaskFormat("question1", "question2", "is_duplicate", BINARY, ("f1", "accuracy")),
    "mnli": TaskFormat(
        "sentence1", "sentence2", "gold_label", ("entailment", "neutral", "contradiction"),
        ("accuracy",),
    ),
    "qnli": TaskFormat("question", "sentence", "label", ENTAILMENT, ("accuracy",)),
    "rte": TaskFormat("sentence1", "sentence2", "label", ENTAILMENT, ("accuracy",)),
    "wnli": TaskFormat("sentence1", "sentence2", "label", BINARY, ("accuracy",)),
}  # fmt: skip
"""Formats of the GLUE files by the `kind` of the task; F1 is that of class 1, "the same"."""


def metrics_for(num_classes: int) -> tuple[Metric, ...]:
    """Return every metric that a task of one's own can have.

    Args:
        num_classes: number of classes; 0 for a regression.
    """
    if num_classes == 0:
        return ("pearson", "spearman")
    return ("accuracy", "f1", "matthews") if num_classes == 2 else ("accuracy", "matthews")
