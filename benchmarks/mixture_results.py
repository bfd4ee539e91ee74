"""Figures of the comparison of mixtures: of each run, over seeds, as a table and as a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpotrain.config import RunConfig
from mpotrain.train.journal import read_metrics
from mpotrain.twins import Variant

BASELINE = "dense"
"""Name of the variant that all others are compared with."""


@dataclass(frozen=True)
class Figures:
    """What one run has come to.

    Attributes:
        variant: its name.
        seed: of initial weights and sample order.
        total_parameters: all trainable parameters.
        active_parameters: parameters that one token meets.
        validation_loss: nats per token on the whole validation split, after the last step.
        bits_per_byte: the same, independent of the vocabulary.
        seconds_per_step: median over the logged intervals.
        peak_memory: bytes, of its own process.
        tokens: tokens trained on.
        largest_load: load of the busiest expert over the even share, mean over mixtures and over
            the last quarter of the run; None without experts.
        idle_experts: experts of a mixture without any token in a step, mean as above.
    """

    variant: str
    seed: int
    total_parameters: int
    active_parameters: int
    validation_loss: float
    bits_per_byte: float | None
    seconds_per_step: float
    peak_memory: int
    tokens: int
    largest_load: float | None
    idle_experts: float | None


@dataclass(frozen=True)
class Summary:
    """A variant over its seeds.

    Attributes:
        variant: its name.
        num_seeds: runs behind the figures.
        total_parameters: all trainable parameters.
        active_parameters: parameters that one token meets.
        loss: mean validation loss.
        loss_std: standard deviation over the seeds (n - 1); NaN for one seed.
        difference: mean of the loss minus that of the dense twin with the same seed.
        difference_std: standard deviation of these differences; NaN for one seed.
        seconds_per_step: median over the seeds.
        largest_load: mean over the seeds; None without experts.
        idle_experts: mean over the seeds; None without experts.
    """

    variant: str
    num_seeds: int
    total_parameters: int
    active_parameters: int
    loss: float
    loss_std: float
    difference: float
    difference_std: float
    seconds_per_step: float
    largest_load: float | None
    idle_experts: float | None


def read_figures(run: RunConfig, variant: Variant) -> Figures:
    """Return what a finished run has come to.

    Args:
        run: its configuration.
        variant: its name and what its journal says of every run.
    """
    folder, steps = Path(run.folder), run.train.steps
    tokens_per_step = variant.tokens / steps
    seconds = [
        line["measured_seconds"] * tokens_per_step / line["measured_tokens"]
        for line in read_metrics(folder, "train")
        if "measured_seconds" in line
    ]
    routers = [
        line["mean"] for line in read_metrics(folder, "router") if line["step"] > 3 * steps // 4
    ]
    return Figures(
        variant=variant.name,
        seed=run.train.seed,
        total_parameters=variant.num_parameters,
        active_parameters=run.model.active_parameters(),
        validation_loss=variant.validation_loss,
        bits_per_byte=variant.bits_per_byte,
        seconds_per_step=statistics.median(seconds),
        peak_memory=variant.peak_memory,
        tokens=variant.tokens,
        largest_load=_mean([line["max_over_mean"] for line in routers]),
        idle_experts=_mean([line["idle_experts"] for line in routers]),
    )


def summarise(figures: Sequence[Figures]) -> list[Summary]:
    """Return every variant over its seeds, in the order of first occurrence.

    Args:
        figures: of all runs; differences need the dense twin with the same seed.
    """
    baseline = {f.seed: f.validation_loss for f in figures if f.variant == BASELINE}
    summaries = []
    for name in dict.fromkeys(f.variant for f in figures):
        runs = [f for f in figures if f.variant == name]
        losses = [run.validation_loss for run in runs]
        pairs = [run.validation_loss - baseline[run.seed] for run in runs if run.seed in baseline]
        summaries.append(
            Summary(
                variant=name,
                num_seeds=len(runs),
                total_parameters=runs[0].total_parameters,
                active_parameters=runs[0].active_parameters,
                loss=statistics.fmean(losses),
                loss_std=_deviation(losses),
                difference=statistics.fmean(pairs) if pairs else float("nan"),
                difference_std=_deviation(pairs),
                seconds_per_step=statistics.median(run.seconds_per_step for run in runs),
                largest_load=_mean([f.largest_load for f in runs if f.largest_load is not None]),
                idle_experts=_mean([f.idle_experts for f in runs if f.idle_experts is not None]),
            )
        )
    return summaries


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def markdown_table(summaries: Sequence[Summary]) -> str:
    """Return the comparison as a Markdown table."""
    lines = [
        "| model | total parameters | active per token | validation loss | minus dense, same seed "
        "| s/step | busiest expert |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for s in summaries:
        difference = "-"
        if s.variant != BASELINE and not math.isnan(s.difference):
            difference = _with_deviation(f"{s.difference:+.4f}", s.difference_std)
        load = "-" if s.largest_load is None else f"{s.largest_load:.2f} x even"
        lines.append(
            f"| {s.variant} | {s.total_parameters:,} | {s.active_parameters:,} "
            f"| {_with_deviation(f'{s.loss:.4f}', s.loss_std)} | {difference} "
            f"| {s.seconds_per_step:.3f} "
            f"| {load} |"
        )
    return "\n".join(lines)


def _with_deviation(text: str, deviation: float) -> str:
    return text if math.isnan(deviation) else f"{text} ± {deviation:.4f}"


def plot_parameters(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Draw validation loss over total and over active parameters into a PNG file.

    Args:
        summaries: points, with the standard deviation over seeds as error bars.
        path: the file.
        title: of the figure.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), dpi=120, sharey=True)
    for axes, count in zip(panels, ("total", "active"), strict=True):
        for marker, s in zip("osD^vP*Xh<>p" * len(summaries), summaries, strict=False):
            size = getattr(s, f"{count}_parameters") / 1e6
            error = None if s.num_seeds == 1 else s.loss_std
            axes.errorbar(size, s.loss, error, fmt=marker, capsize=3, label=s.variant, alpha=0.85)
        axes.set_xscale("log")
        axes.set_xlabel(f"{count} parameters (millions)")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[1].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
