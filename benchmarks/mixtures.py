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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison, Run, comparison_parser
from benchmarks.mixture_results import (
    BASELINE,
    markdown_table,
    plot_parameters,
    read_figures,
    summarise,
)
from mpotrain.train.journal import plain_json
from mpotrain.twins import plot_curves, read_variant

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


def main() -> None:
    """Prepare the text, train what is not trained yet, write table, plots and JSON."""
    text = __doc__.splitlines()[0] if __doc__ else ""
    title = "Mixtures of experts and their dense twin"
    parser = comparison_parser(text, VARIANTS, vocab_size=1024, steps=500, title=title)
    Comparison("benchmarks.mixtures", RUN_FILE, VARIANTS, _write).main(parser)


def _write(
    out: Path, runs: Sequence[Run], options: argparse.Namespace, record: dict[str, Any]
) -> None:
    variants = [read_variant(run.variant, run.config) for run in runs]
    figures = [
        read_figures(run.config, variant) for run, variant in zip(runs, variants, strict=True)
    ]
    first = [v for run, v in zip(runs, variants, strict=True) if run.seed == 1]
    summaries = summarise(figures)
    table = markdown_table(summaries)
    (out / "results.md").write_text(table + "\n", encoding="utf-8")
    plot_parameters(summaries, out / "parameters.png", options.title)
    plot_curves(first, out / "curves.png", f"{options.title}, seed 1")
    record |= {
        "summaries": [plain_json(asdict(summary)) for summary in summaries],
        "runs": [plain_json(asdict(run)) for run in figures],
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    written = ("results.md", "results.json", "parameters.png", "curves.png")
    print(f"\n{table}\n\nWritten to {out}: {', '.join(written)}")


if __name__ == "__main__":
    main()
