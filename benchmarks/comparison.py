"""Variants of one run file, trained on one text at equal tokens with several seeds.

All variants of a comparison share base model, text, order of the samples and schedule; only their
overrides differ. Every seed has initial weights and an order of the samples of its own, the same
ones for all variants. A second call goes on: finished runs are read, stopped ones continued.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment
from mpotrain.config import RunConfig, load_config
from mpotrain.data.config import PrepareConfig, SentencePieceConfig
from mpotrain.data.prepare import prepare
from mpotrain.errors import EXIT_CRASH, EXIT_STOPPED, MpotrainError
from mpotrain.run_end import OUTCOME_FILE
from mpotrain.train.state import Outcome
from mpotrain.twins import read_variant


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        variant: its name.
        seed: of initial weights and sample order.
        run_file: what all variants share.
        overrides: laid over it.
        config: the validated run.
    """

    variant: str
    seed: int
    run_file: Path
    overrides: list[str]
    config: RunConfig

    @property
    def is_done(self) -> bool:
        """Whether the run has made all its steps."""
        outcome = Path(self.config.folder) / OUTCOME_FILE
        if not outcome.is_file():
            return False
        return bool(json.loads(outcome.read_text("utf-8"))["outcome"] == Outcome.DONE)


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        name: of the module, in messages.
        run_file: what all variants share.
        variants: overrides of each variant.
        write: writes tables, plots and figures of all finished runs; gets the folder, the runs and
            what is to be recorded of settings, data and machine.
        first_seed: variants that are trained with the first seed alone.
    """

    name: str
    run_file: Path
    variants: Mapping[str, tuple[str, ...]]
    write: Callable[[Path, Sequence[Run], argparse.Namespace, dict[str, Any]], None]
    first_seed: frozenset[str] = frozenset()

    def main(self, parser: argparse.ArgumentParser) -> None:
        """Prepare the text, train what is not trained yet, write the results.

        Args:
            parser: made by `comparison_parser`.
        """
        options = parser.parse_args()
        # A batch system ends a job so; the runs in progress are told to save.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
        try:
            self._compare(options)
        except MpotrainError as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    def _compare(self, options: argparse.Namespace) -> None:
        out: Path = options.out
        # Settings that cannot run are refused before the text is prepared.
        self._runs(options)
        settings = self._check_settings(options)
        manifest = prepare(
            PrepareConfig(
                sources=tuple(options.source),
                out=str(out / "data"),
                tokenizer=SentencePieceConfig(
                    vocab_size=options.vocab_size, max_training_bytes=4_000_000
                ),
                max_bytes=options.max_bytes,
                documents_per_shard=512,
                per_line=options.per_line,
            ),
            progress=True,
        )
        runs = self._runs(options)
        train_all(runs, options.jobs)
        record = {
            # Where the text lay on this machine is nobody's business.
            "settings": settings | {"source": [Path(name).name for name in options.source]},
            "data_digest": manifest.digest,
            "jobs": options.jobs,
            "environment": environment(torch.device("cpu")),
        }
        self.write(out, runs, options, record)

    def _runs(self, options: argparse.Namespace) -> list[Run]:
        data = (options.out / "data").as_posix()
        objective = load_config(self.run_file).data.objective
        shared = [
            f'data.sources=[{{path="{data}"}}]',
            f"model.vocab_size={objective.vocab_size(options.vocab_size)}",
            f"train.steps={options.steps}",
            f"train.eval_every={options.steps}",
            f"checkpoint.every={max(options.steps // 2, 1)}",
            *options.set,
        ]
        return [
            self._run(options.out, variant, seed, shared)
            for seed in range(1, options.seeds + 1)
            for variant in options.variants
            if seed == 1 or variant not in self.first_seed
        ]

    def _run(self, out: Path, variant: str, seed: int, shared: Sequence[str]) -> Run:
        folder = out / "runs" / f"{variant}-seed{seed}"
        overrides = [
            *shared,
            *self.variants[variant],
            f"train.seed={seed}",
            f"data.seed={seed}",
            f'name="{folder.name}"',
            f'folder="{folder.as_posix()}"',
        ]
        config = load_config(self.run_file, overrides)
        return Run(variant, seed, self.run_file, overrides, config)

    def _check_settings(self, options: argparse.Namespace) -> dict[str, Any]:
        """Keep runs of different settings apart: their losses must not meet in one table."""
        names = ("source", "per_line", "vocab_size", "max_bytes", "steps", "set")
        settings = {name: getattr(options, name) for name in names}
        settings["run_file"] = self.run_file.read_text("utf-8")
        settings["variants"] = {name: list(lines) for name, lines in self.variants.items()}
        path = options.out / "settings.json"
        options.out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
            return settings
        before = json.loads(path.read_text("utf-8"))
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise MpotrainError(
                f"{path}: the runs in this folder were made with another {', '.join(changed)}; "
                "choose another --out, or call with the same settings"
            )
        return settings


def comparison_parser(
    text: str, variants: Mapping[str, Any], *, vocab_size: int, steps: int, title: str
) -> argparse.ArgumentParser:
    """Return the options that all comparisons have.

    Args:
        text: what is compared.
        variants: names of the variants.
        vocab_size: default of `--vocab-size`.
        steps: default of `--steps`.
        title: default title of plots.
    """
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", nargs="+", default=["installed:stdlib,torch,numpy"])
    parser.add_argument("--per-line", action="store_true", help="every line is a document")
    parser.add_argument("--vocab-size", type=int, default=vocab_size)
    parser.add_argument("--max-bytes", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N")
    parser.add_argument(
        "--variants", nargs="+", choices=list(variants), default=list(variants), metavar="NAME",
        help=f"some of: {', '.join(variants)}",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all variants"
    )
    parser.add_argument("--title", default=title)
    return parser


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Train runs to their ends, some at a time, each in a process of its own on one core.

    Args:
        runs: what to train; finished ones are left alone.
        jobs: processes at a time.

    Raises:
        MpotrainError: a run failed or was stopped. Those in progress have been told to save.
    """
    waiting = [run for run in runs if not run.is_done]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before", flush=True)
    active: dict[subprocess.Popen[bytes], Run] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                active[_start(run)] = run
            time.sleep(0.2)
            for process in [process for process in active if process.poll() is not None]:
                run = active.pop(process)
                if process.returncode != 0:
                    error = MpotrainError(
                        f"{run.variant}, seed {run.seed} ended with exit code "
                        f"{process.returncode}; see {_log_file(run)}. Once mended, the same "
                        "command goes on"
                    )
                    error.exit_code = process.returncode if process.returncode > 0 else EXIT_CRASH
                    raise error
                loss = read_variant(run.variant, run.config).validation_loss
                print(f"{run.variant}, seed {run.seed}: validation loss {loss:.4f}", flush=True)
    finally:
        for process in active:
            process.terminate()
        for process in active:
            process.wait()


def _start(run: Run) -> subprocess.Popen[bytes]:
    log = _log_file(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    # A session of its own: after Ctrl-C a run gets one signal, from here, and saves.
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "mpotrain", "train", str(run.run_file), *run.overrides],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def _log_file(run: Run) -> Path:
    folder = Path(run.config.folder)
    return folder.parents[1] / "logs" / f"{folder.name}.log"
