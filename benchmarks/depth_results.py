"""Figures of the comparison of deep encoders: of each run, over seeds, as a table and as plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpotrain.config import RunConfig
from mpotrain.errors import MpotrainError
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.train.journal import read_metrics


@dataclass(frozen=True)
class Figures:
    """What one run has come to.

    Attributes:
        variant: its name.
        seed: of initial weights and sample order.
        num_layers: depth.
        num_parameters: without the head of pretraining, as papers count.
        layer_parameters: of all layers, what they share included; without embeddings.
        validation_loss: nats per masked token on the validation split, after the last step.
        accuracy: share of masked tokens with the highest score.
        num_skipped: steps that the policy for anomalies left out.
        seconds_per_step: median over the logged intervals.
        curve: (step, loss, gradient norm) of the logged steps.
    """

    variant: str
    seed: int
    num_layers: int
    num_parameters: int
    layer_parameters: int
    validation_loss: float
    accuracy: float
    num_skipped: int
    seconds_per_step: float
    curve: list[tuple[int, float, float]]


@dataclass(frozen=True)
class Summary:
    """A variant over its seeds.

    Attributes:
        variant: its name.
        num_seeds: runs behind the figures.
        num_layers: depth.
        num_parameters: without the head of pretraining.
        layer_parameters: of all layers.
        loss: mean validation loss.
        loss_std: standard deviation over the seeds (n - 1); NaN for one seed.
        accuracy: mean over the seeds.
        largest_norm: largest logged gradient norm.
        num_skipped: skipped steps of all seeds.
        seconds_per_step: median over the seeds.
    """

    variant: str
    num_seeds: int
    num_layers: int
    num_parameters: int
    layer_parameters: int
    loss: float
    loss_std: float
    accuracy: float
    largest_norm: float
    num_skipped: int
    seconds_per_step: float


def read_figures(variant: str, run: RunConfig) -> Figures:
    """Return what a finished run has come to.

    Args:
        variant: its name.
        run: its configuration.

    Raises:
        MpotrainError: the run is not of an encoder, or has not been evaluated.
    """
    folder, model = Path(run.folder), run.model
    train, evaluated = read_metrics(folder, "train"), read_metrics(folder, "eval")
    if not train or not evaluated or not isinstance(model, EncoderConfig):
        raise MpotrainError(f"{folder}: holds no finished run of an encoder")
    per_step = run.train.global_batch_size * run.data.sequence_length
    seconds = [
        line["measured_seconds"] * per_step / line["measured_tokens"]
        for line in train
        if "measured_seconds" in line
    ]
    layers = [
        info.size
        for info in model.parameters()
        if info.name.startswith(("blocks.", "bank.", "tied.", "adapters."))
    ]
    return Figures(
        variant=variant,
        seed=run.train.seed,
        num_layers=model.num_layers,
        num_parameters=model.body_parameters(),
        layer_parameters=sum(layers),
        validation_loss=evaluated[-1]["loss"],
        accuracy=evaluated[-1]["accuracy"],
        num_skipped=train[-1]["num_skipped"],
        seconds_per_step=statistics.median(seconds),
        curve=[(line["step"], line["loss"], line["grad_norm"]) for line in train],
    )


def summarise(figures: Sequence[Figures]) -> list[Summary]:
    """Return every variant over its seeds, in the order of first occurrence."""
    summaries = []
    for name in dict.fromkeys(f.variant for f in figures):
        runs = [f for f in figures if f.variant == name]
        losses = [run.validation_loss for run in runs]
        summaries.append(
            Summary(
                variant=name,
                num_seeds=len(runs),
                num_layers=runs[0].num_layers,
                num_parameters=runs[0].num_parameters,
                layer_parameters=runs[0].layer_parameters,
                loss=statistics.fmean(losses),
                loss_std=statistics.stdev(losses) if len(losses) > 1 else math.nan,
                accuracy=statistics.fmean(run.accuracy for run in runs),
                largest_norm=max(norm for run in runs for _, _, norm in run.curve),
                num_skipped=sum(run.num_skipped for run in runs),
                seconds_per_step=statistics.median(run.seconds_per_step for run in runs),
            )
        )
    return summaries


def markdown_table(summaries: Sequence[Summary]) -> str:
    """Return the comparison as a Markdown table."""
    lines = [
        "| encoder | layers | parameters | of them in layers | validation loss | accuracy "
        "| largest gradient norm | s/step |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for s in summaries:
        spread = "" if math.isnan(s.loss_std) else f" ± {s.loss_std:.4f}"
        lines.append(
            f"| {s.variant} | {s.num_layers} | {s.num_parameters:,} | {s.layer_parameters:,} "
            f"| {s.loss:.4f}{spread} | {100 * s.accuracy:.1f} % | {s.largest_norm:.2f} "
            f"| {s.seconds_per_step:.3f} |"
        )
    return "\n".join(lines)


def plot_parameters(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Draw validation loss over parameters of the layers into a PNG file.

    Args:
        summaries: points, with the standard deviation over seeds as error bars.
        path: the file.
        title: of the figure.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=120)
    for marker, s in zip("osD^vP*X" * len(summaries), summaries, strict=False):
        error = None if math.isnan(s.loss_std) else s.loss_std
        label = f"{s.variant} ({s.num_layers} layers)"
        axes.errorbar(s.layer_parameters / 1e6, s.loss, error, fmt=marker, capsize=3, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("parameters of all layers (millions)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("validation loss (nats per masked token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plot_deep(figures: Sequence[Figures], path: Path, title: str) -> None:
    """Draw training loss and gradient norm of every seed of the deepest runs into a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    depth = max(f.num_layers for f in figures)
    deepest = [f for f in figures if f.num_layers == depth]
    names = list(dict.fromkeys(f.variant for f in deepest))
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.0), dpi=120)
    for run in deepest:
        steps, losses, norms = zip(*run.curve, strict=True)
        color = f"C{names.index(run.variant)}"
        label = run.variant if run.seed == 1 else None
        panels[0].plot(steps, losses, color=color, alpha=0.8, label=label)
        panels[1].plot(steps, norms, color=color, alpha=0.8, label=label)
    panels[0].set_ylabel("training loss (nats per masked token)")
    panels[1].set_ylabel("gradient norm")
    panels[1].set_yscale("log")
    for axes in panels:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{title}: {depth} layers, every seed")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
