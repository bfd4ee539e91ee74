"""What deep encoders may share: loss on real text at equal tokens, several seeds.

    python -m benchmarks.depth --out runs/depth                       # prose of this machine
    python -m benchmarks.depth --out runs/depth --source passages.jsonl --jobs 2

24 layers that share everything (ALBERT), central tensors alone (MPOBERT, Liu et al. 2023) without
and with adapters, or nothing; and 48 post-norm layers that share central tensors, with the scaling
of the stable initialisation and without (first seed alone). All variants share base model, text,
order of the samples and schedule (benchmarks/depth.toml). Writes a table, a plot of the loss
against the parameters, the training curves and gradient norms of the deep runs, and a JSON file
with all figures, hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison, Run, comparison_parser
from benchmarks.depth_results import (
    markdown_table,
    plot_deep,
    plot_parameters,
    read_figures,
    summarise,
)
from mpotrain.train.journal import plain_json

RUN_FILE = Path(__file__).with_suffix(".toml")

# 64 and 256 in the proportions of the published sizes: five cores, exact bonds, a central tensor as
# large as the matrix it stands for, auxiliaries 7.8 times smaller.
SHAPES = {
    "query": ([2, 2, 4, 2, 2], [2, 2, 4, 2, 2]),
    "key": ([2, 2, 4, 2, 2], [2, 2, 4, 2, 2]),
    "value": ([2, 2, 4, 2, 2], [2, 2, 4, 2, 2]),
    "attention_out": ([2, 2, 4, 2, 2], [2, 2, 4, 2, 2]),
    "c_fc": ([2, 2, 4, 2, 2], [2, 4, 4, 4, 2]),
    "c_proj": ([2, 4, 4, 4, 2], [2, 2, 4, 2, 2]),
}


def _sites(init: str) -> tuple[str, ...]:
    return tuple(
        f'model.sites.{family}={{kind="mpo", in_modes={rows}, out_modes={columns}, init="{init}"}}'
        for family, (rows, columns) in SHAPES.items()
    )


SHARED = 'model.sharing={scope="central"}'
CENTRAL = (*_sites("balanced"), SHARED)
"""Central tensors for the auxiliaries of all layers."""
ADAPTERS = "model.adapter={rank=4}"
DEEP = (*_sites("xavier"), SHARED, "model.num_layers=48", 'model.norm="post"')
"""The published order of norms and the start of the paper's main text."""
STABLE = 'model.start={auxiliary_scale="per_side"}'
"""What corollary A.2 of the paper asks of deep networks that start from random weights."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "all-shared": ('model.sharing={scope="all"}',),
    "central-shared": CENTRAL,
    "central-shared-adapters": (*CENTRAL, ADAPTERS),
    "untied": (),
    "deep-stable": (*DEEP, STABLE),
    "deep-unscaled": DEEP,
}
"""Overrides of each variant."""


def main() -> None:
    """Prepare the text, train what is not trained yet, write table, plots and JSON."""
    text = __doc__.splitlines()[0] if __doc__ else ""
    title = "What deep encoders share"
    parser = comparison_parser(text, VARIANTS, vocab_size=512, steps=600, title=title)
    deep = frozenset(name for name in VARIANTS if name.startswith("deep-"))
    Comparison("benchmarks.depth", RUN_FILE, VARIANTS, _write, deep).main(parser)


def _write(
    out: Path, runs: Sequence[Run], options: argparse.Namespace, record: dict[str, Any]
) -> None:
    figures = [read_figures(run.variant, run.config) for run in runs]
    summaries = summarise(figures)
    table = markdown_table(summaries)
    (out / "results.md").write_text(table + "\n", encoding="utf-8")
    plot_parameters(summaries, out / "parameters.png", options.title)
    plot_deep(figures, out / "deep.png", options.title)
    record |= {
        "summaries": [plain_json(asdict(summary)) for summary in summaries],
        "runs": [plain_json(asdict(run)) for run in figures],
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    written = ("results.md", "results.json", "parameters.png", "deep.png")
    print(f"\n{table}\n\nWritten to {out}: {', '.join(written)}")


if __name__ == "__main__":
    main()
