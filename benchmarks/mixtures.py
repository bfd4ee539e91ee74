"""Mixtures of experts against their dense twin: loss on real text at equal tokens, several seeds.

    python -m benchmarks.mixtures --out runs/mixtures                  # prose of this machine
    python -m benchmarks.mixtures --out runs/mixtures --source passages.jsonl --jobs 2

All variants share base model, text, order of the samples and schedule (benchmarks/mixtures.toml);
only the feed-forward layers differ. Every seed has initial weights and an order of the samples of
its own, the same ones for all variants, so the difference to the dense twin is taken seed by seed.
Writes a table, a plot of the loss against total and active parameters, the training curves of the
first seed, and a JSON file with all figures, hardware, versions and commit. A second call goes on:
finished runs are read, stopped ones continued.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.measure import environment
from benchmarks.mixture_results import (
    BASELINE,
    Figures,
    markdown_table,
    plot_parameters,
    read_figures,
    summarise,
)
from mpotrain.config import RunConfig, load_config
from mpotrain.data.config import PrepareConfig, SentencePieceConfig
from mpotrain.data.prepare import prepare
from mpotrain.errors import EXIT_CRASH, EXIT_STOPPED, MpotrainError
from mpotrain.run_record import OUTCOME_FILE
from mpotrain.train.journal import plain_json
from mpotrain.train.state import Outcome
from mpotrain.twins import Variant, plot_curves, read_variant

RUN_FILE = Path(__file__).with_suffix(".toml")

NUM_EXPERTS = 8
ROUTER = '{top_k=1, gate="straight_through", balance_loss=0.01}'
"""Top-1 with a gate of p / stop_gradient(p), as the released MPOE code; no token is dropped."""


def _mixture(c_fc: str, c_proj: str) -> str:
    return (
        f"model.moe={{num_experts={NUM_EXPERTS}, every=1, router={ROUTER}, "
        f"c_fc={c_fc}, c_proj={c_proj}}}"
    )


SWITCH = _mixture('{kind="dense"}', '{kind="dense"}')
"""An ordinary matrix for each expert."""
# 128 x 512 in the proportions of the published 768 x 3072 ([3,4,4,4,4] x [4,4,8,6,4]): five cores,
# exact bonds, a central tensor 12.7 times as large as the auxiliaries of one expert (12.8 there).
MPOE = _mixture(
    '{kind="mpo", in_modes=[2,4,4,2,2], out_modes=[2,4,8,4,2]}',
    '{kind="mpo", in_modes=[2,4,8,4,2], out_modes=[2,4,4,2,2]}',
)
"""A shared central tensor and auxiliaries for each expert, which start as copies."""
INDEPENDENT = MPOE.replace('kind="mpo"', 'kind="mpo", start="independent"')
"""The same with a draw of its own for each expert."""
# Modes of 64 and 32 give an expert 5,120 elements of its own, MPOE 5,152: equal totals.
ASYMMETRIC = _mixture(
    '{kind="asymmetric", in_mode=64, out_mode=32}',
    '{kind="asymmetric", in_mode=32, out_mode=64}',
)
"""Experts act on one input mode and one output mode of a shared matrix of full size."""
ASYMMETRIC_HALF = _mixture(
    '{kind="asymmetric", in_mode=64, out_mode=32, in_bond=32, out_bond=16}',
    '{kind="asymmetric", in_mode=32, out_mode=64, in_bond=16, out_bond=32}',
)
"""The same with half bonds: a quarter of the shared matrix."""


def _masked(probability: float) -> str:
    return f'train.central_mask={{probability={probability}, granularity="step"}}'


VARIANTS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "switch-8": (SWITCH,),
    "mpoe-8": (MPOE,),
    "mpoe-8-mask0.3": (MPOE, _masked(0.3)),
    "mpoe-8-mask0.7": (MPOE, _masked(0.7)),
    "mpoe-8-independent": (INDEPENDENT,),
    "asymmetric-8": (ASYMMETRIC,),
    "asymmetric-8-half": (ASYMMETRIC_HALF,),
}
"""Overrides of each variant."""


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        variant: its name.
        seed: of initial weights and sample order.
        overrides: of the shared run file.
        config: the validated run.
    """

    variant: str
    seed: int
    overrides: list[str]
    config: RunConfig

    @property
    def is_done(self) -> bool:
        """Whether the run has made all its steps."""
        outcome = Path(self.config.folder) / OUTCOME_FILE
        if not outcome.is_file():
            return False
        return bool(json.loads(outcome.read_text("utf-8"))["outcome"] == Outcome.DONE)


def main() -> None:
    """Prepare the text, train what is not trained yet, write table, plots and JSON."""
    options = _parser().parse_args()
    # A batch system ends a job so; the runs in progress are told to save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    try:
        _compare(options)
    except MpotrainError as error:
        print(f"benchmarks.mixtures: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _compare(options: argparse.Namespace) -> None:
    out: Path = options.out
    # Settings that cannot run are refused before the text is prepared.
    _runs(out, options, options.vocab_size)
    _check_settings(out, options)
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
    runs = _runs(out, options, manifest.tokenizer.vocab_size)
    train_all(runs, options.jobs)
    variants = [read_variant(run.variant, run.config) for run in runs]
    figures = [
        read_figures(run.config, variant) for run, variant in zip(runs, variants, strict=True)
    ]
    first = [v for run, v in zip(runs, variants, strict=True) if run.seed == 1]
    _write(out, options, manifest.digest, figures, first)


def _runs(out: Path, options: argparse.Namespace, vocab_size: int) -> list[Run]:
    shared = [
        f'data.sources=[{{path="{(out / "data").as_posix()}"}}]',
        f"model.vocab_size={vocab_size}",
        f"train.steps={options.steps}",
        f"train.eval_every={options.steps}",
        f"checkpoint.every={max(options.steps // 2, 1)}",
        *options.set,
    ]
    return [
        _run(out, variant, seed, shared)
        for seed in range(1, options.seeds + 1)
        for variant in options.variants
    ]


def _run(out: Path, variant: str, seed: int, shared: Sequence[str]) -> Run:
    folder = out / "runs" / f"{variant}-seed{seed}"
    overrides = [
        *shared,
        *VARIANTS[variant],
        f"train.seed={seed}",
        f"data.seed={seed}",
        f'name="{folder.name}"',
        f'folder="{folder.as_posix()}"',
    ]
    return Run(variant, seed, overrides, load_config(RUN_FILE, overrides))


def _check_settings(out: Path, options: argparse.Namespace) -> None:
    """Keep runs of different settings apart: their losses must not meet in one table."""
    names = ("source", "per_line", "vocab_size", "max_bytes", "steps", "set")
    settings = {name: getattr(options, name) for name in names}
    settings["run_file"] = RUN_FILE.read_text("utf-8")
    settings["variants"] = {name: list(overrides) for name, overrides in VARIANTS.items()}
    path = out / "settings.json"
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
        return
    before = json.loads(path.read_text("utf-8"))
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise MpotrainError(
            f"{path}: the runs in this folder were made with another {', '.join(changed)}; choose "
            "another --out, or call with the same settings"
        )


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
            [sys.executable, "-m", "mpotrain", "train", str(RUN_FILE), *run.overrides],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def _log_file(run: Run) -> Path:
    folder = Path(run.config.folder)
    return folder.parents[1] / "logs" / f"{folder.name}.log"


def _write(
    out: Path,
    options: argparse.Namespace,
    data_digest: str,
    figures: Sequence[Figures],
    first: Sequence[Variant],
) -> None:
    summaries = summarise(figures)
    table = markdown_table(summaries)
    (out / "results.md").write_text(table + "\n", encoding="utf-8")
    plot_parameters(summaries, out / "parameters.png", options.title)
    plot_curves(first, out / "curves.png", f"{options.title}, seed 1")
    record = {
        "settings": json.loads((out / "settings.json").read_text("utf-8")),
        "data_digest": data_digest,
        "jobs": options.jobs,
        "environment": environment(torch.device("cpu")),
        "summaries": [plain_json(asdict(summary)) for summary in summaries],
        "runs": [plain_json(asdict(run)) for run in figures],
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    written = ("results.md", "results.json", "parameters.png", "curves.png")
    print(f"\n{table}\n\nWritten to {out}: {', '.join(written)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", nargs="+", default=["installed:stdlib,torch,numpy"])
    parser.add_argument("--per-line", action="store_true", help="every line is a document")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--max-bytes", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
        help=f"some of: {', '.join(VARIANTS)}",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all variants"
    )
    parser.add_argument("--title", default="Mixtures of experts and their dense twin")
    return parser


if __name__ == "__main__":
    main()
