"""Variants of one run, trained one after the other at equal tokens, and their comparison.

Each variant is a process of its own, so that peak memory and speed belong to it alone; its
numbers are read from the journal that every run writes.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpotrain.config import RunConfig, load_config
from mpotrain.errors import EXIT_CRASH, EXIT_STOPPED, MpotrainError
from mpotrain.models.gpt2_config import SITE_NAMES
from mpotrain.train.journal import read_metrics

DENSE_TWIN = tuple(f'model.sites.{family}={{kind="dense"}}' for family in SITE_NAMES)
"""Overrides that make every site of a run dense."""


@dataclass(frozen=True)
class Variant:
    """One variant after training.

    Attributes:
        name: of the variant.
        folder: its run folder.
        num_parameters: trainable parameters.
        validation_loss: last evaluation, nats per token.
        bits_per_byte: the same, independent of the vocabulary; None where bytes are unknown.
        tokens_per_second: tokens of the measured steps over their time.
        peak_memory: bytes, of its own process.
        tokens: tokens trained on.
        curve: (tokens, training loss) of every logged step.
    """

    name: str
    folder: Path
    num_parameters: int
    validation_loss: float
    bits_per_byte: float | None
    tokens_per_second: float
    peak_memory: int
    tokens: int
    curve: list[tuple[int, float]]


def train_variants(
    run_file: Path, variants: Mapping[str, Sequence[str]], folder: Path
) -> list[Variant]:
    """Train every variant to its end (or go on with it) and return its numbers.

    Args:
        run_file: the run that all share.
        variants: name -> overrides; all get the run folder `folder/name`.
        folder: parent of the run folders.

    Returns:
        One result for each variant, in order.

    Raises:
        MpotrainError: a variant did not reach its last step.
        ConfigError: the run file or an override is wrong (found before anything is started).
    """
    prepared = []
    for name, overrides in variants.items():
        own = [*overrides, f'name="{name}"', f'folder="{(folder / name).as_posix()}"']
        prepared.append((name, own, load_config(run_file, own)))
    results = []
    for name, overrides, run in prepared:
        arguments = ["mpotrain", "train", str(run_file), *overrides]
        code = _run([sys.executable, "-m", *arguments])
        if code == EXIT_STOPPED:
            error = MpotrainError(f"{name} was stopped and saved; run the same command to go on")
            error.exit_code = EXIT_STOPPED
            raise error
        if code != 0:
            error = MpotrainError(
                f"{name} ended with exit code {code}; run it alone: {shlex.join(arguments)}"
            )
            error.exit_code = code if code > 0 else EXIT_CRASH
            raise error
        results.append(read_variant(name, run))
    return results


def _run(command: list[str]) -> int:
    """Run a child to its end; passes SIGTERM on, and lets it save after Ctrl-C."""
    children: list[subprocess.Popen[bytes]] = []
    warnings: list[int] = []

    def pass_on(number: int, _: object) -> None:
        warnings.append(number)
        for child in children:
            child.terminate()

    # Before the child: a signal that comes while it starts is passed on as soon as it has.
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        child = subprocess.Popen(command)
        children.append(child)
        if warnings:
            child.terminate()
        while True:
            try:
                code = child.wait()
                # A child that was stopped before it could listen has lost nothing.
                return EXIT_STOPPED if warnings and code == -signal.SIGTERM else code
            except KeyboardInterrupt:
                # The terminal has sent it to the child as well, which saves now; a second Ctrl-C
                # kills the child by itself.
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def read_variant(name: str, run: RunConfig) -> Variant:
    """Read the numbers of a finished run from its journal.

    Raises:
        MpotrainError: the journal holds no training step or no evaluation.
    """
    folder = Path(run.folder)
    steps = read_metrics(folder, "train")
    evaluations = read_metrics(folder, "eval")
    if not steps or not evaluations:
        raise MpotrainError(f"{folder}: the journal has no finished training with an evaluation")
    measured = [s for s in steps if "measured_seconds" in s]
    seconds = sum(s["measured_seconds"] for s in measured)
    rate = sum(s["measured_tokens"] for s in measured) / seconds if seconds else 0.0
    last = evaluations[-1]
    return Variant(
        name=name,
        folder=folder,
        num_parameters=run.model.num_parameters(),
        validation_loss=last["loss"],
        bits_per_byte=last.get("bits_per_byte"),
        tokens_per_second=rate,
        peak_memory=max(s["memory_bytes"] for s in steps),
        tokens=steps[-1]["tokens"],
        curve=[(s["tokens"], s["loss"]) for s in steps],
    )


def markdown_table(variants: Sequence[Variant]) -> str:
    """Return the comparison as a Markdown table."""
    lines = [
        "| model | parameters | tokens | validation loss | bits/byte | tokens/s | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for v in variants:
        bits = "-" if v.bits_per_byte is None else f"{v.bits_per_byte:.3f}"
        lines.append(
            f"| {v.name} | {v.num_parameters:,} | {v.tokens:,} | {v.validation_loss:.4f} | {bits} "
            f"| {v.tokens_per_second:,.0f} | {v.peak_memory / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def plot_curves(variants: Sequence[Variant], path: Path, title: str) -> None:
    """Draw the training losses over tokens into a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    for variant in variants:
        tokens, losses = zip(*variant.curve, strict=True)
        axes.plot(tokens, losses, label=f"{variant.name} ({variant.num_parameters:,} parameters)")
    axes.set_xlabel("tokens")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
