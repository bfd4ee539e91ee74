"""A TTM GPT-2 and its dense twin, pretrained on the same text at equal tokens.

    python -m benchmarks.twins --out runs/twins                       # prose of this machine
    python -m benchmarks.twins --out runs/twins --source 'books/*.jsonl.gz' --steps 2000

Writes a table (parameters, validation loss, bits per byte, tokens per second, peak memory), a plot
of the training losses and a JSON file with hardware, versions and commit. A second call goes on
with runs that were stopped. Each variant is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from mpotrain.checkpoint.manifest_file import library_versions
from mpotrain.data.config import PrepareConfig, SentencePieceConfig
from mpotrain.data.prepare import prepare
from mpotrain.twins import DENSE_TWIN, Variant, markdown_table, plot_curves, train_variants

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "configs" / "runs" / "demo.toml"
SMALLER = (
    'model.sites.c_fc={kind="ttm", rank=16}',
    'model.sites.c_proj={kind="ttm", rank=16}',
)


def main() -> None:
    """Prepare the text, train the variants, write table, plot and JSON."""
    options = _parser().parse_args()
    out: Path = options.out
    data = out / "data"
    manifest = prepare(
        PrepareConfig(
            sources=tuple(options.source),
            out=str(data),
            tokenizer=SentencePieceConfig(
                vocab_size=options.vocab_size, max_training_bytes=4_000_000
            ),
            max_bytes=options.max_bytes,
            documents_per_shard=512,
            per_line=options.per_line,
        ),
        progress=True,
    )
    overrides = [
        f'data.sources=[{{path="{data.as_posix()}"}}]',
        f"model.vocab_size={manifest.tokenizer.vocab_size}",
        f"train.steps={options.steps}",
        f"train.seed={options.seed}",
        f"train.eval_every={max(options.steps // 2, 1)}",
        "train.eval_sequences=100000",
        f"checkpoint.every={max(options.steps // 2, 1)}",
    ]
    variants = train_variants(
        RUN_FILE,
        {
            "ttm": overrides,
            "ttm-rank16": [*overrides, *SMALLER],
            "dense": [*overrides, *DENSE_TWIN],
        },
        out,
    )
    _write(out, variants, options, manifest.digest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", nargs="+", default=["installed:stdlib,torch,numpy"])
    parser.add_argument("--per-line", action="store_true", help="every line is a document")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--max-bytes", type=int, default=8_000_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--title", default="TTM GPT-2 and its dense twin")
    return parser


def _write(
    out: Path, variants: list[Variant], options: argparse.Namespace, data_digest: str
) -> None:
    table = markdown_table(variants)
    (out / "results.md").write_text(table + "\n", encoding="utf-8")
    plot_curves(variants, out / "loss.png", options.title)
    record = {
        "source": options.source,
        "data_digest": data_digest,
        "steps": options.steps,
        "seed": options.seed,
        "machine": f"{platform.machine()}, {platform.processor() or 'unknown processor'}",
        "versions": library_versions(),
        "variants": [asdict(variant) | {"folder": str(variant.folder)} for variant in variants],
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{table}\n\n{out / 'results.md'}, {out / 'loss.png'}\n")


if __name__ == "__main__":
    main()
