"""`mpotrain demo`: from the prose on this machine to a tensorized GPT-2 that writes, in minutes.

Nothing is downloaded: docstrings and help topics of Python, torch and numpy are harvested, a
sentencepiece vocabulary is trained on them, and a TTM GPT-2 and its dense twin are pretrained at
equal tokens on the local engine.
"""

from __future__ import annotations

import lzma
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mpotrain.config import load_config
from mpotrain.data.config import PrepareConfig, SentencePieceConfig
from mpotrain.data.prepare import prepare
from mpotrain.errors import EXIT_DONE, ConfigError
from mpotrain.generate import Sampling
from mpotrain.report.text import render
from mpotrain.report.weigh import weigh
from mpotrain.trained import generate_texts, held_out_text
from mpotrain.twins import DENSE_TWIN, Variant, markdown_table, plot_curves, train_variants

RUN_FILE = Path(__file__).resolve().parents[1] / "configs" / "runs" / "demo.toml"
PROMPTS = ("Return the", "If the file", "This method")
MAX_TEXT_BYTES = 8_000_000
VOCAB_SIZE = 2048


def demo(out: Path, steps: int | None = None) -> int:
    """Run the demo.

    Args:
        out: folder for data, runs, plot and texts; a second call goes on where one was stopped.
        steps: number of training steps instead of the run file's.

    Returns:
        The exit code.

    Raises:
        ConfigError: the run file of the demo is not there (it lives in the repository).
    """
    if not RUN_FILE.is_file():
        raise ConfigError([f"{RUN_FILE}: not found; the demo needs a clone of the repository"])
    if steps is not None and steps < 1:
        raise ConfigError([f"command line: --steps {steps}: must be at least 1"])
    start = time.monotonic()
    data = out / "data"
    overrides = [f'data.sources=[{{path="{data.as_posix()}"}}]']
    if steps is not None:
        overrides += [f"train.steps={steps}", "train.schedule.warmup_steps=0"]
    _say("1/4  Harvesting docstrings and help topics of Python, torch and numpy")
    manifest = prepare(
        PrepareConfig(
            sources=("installed:stdlib,torch,numpy",),
            out=str(data),
            tokenizer=SentencePieceConfig(vocab_size=VOCAB_SIZE, max_training_bytes=2_000_000),
            max_bytes=MAX_TEXT_BYTES,
            documents_per_shard=512,
        ),
        progress=True,
    )
    _say(f"     {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens in {data}")
    _say("2/4  What will be trained")
    _say(render(weigh(load_config(RUN_FILE, overrides), device="cpu")))
    _say("3/4  Pretraining: the TTM model, then its dense twin at equal tokens")
    variants = train_variants(RUN_FILE, {"ttm": overrides, "dense": [*overrides, *DENSE_TWIN]}, out)
    _say("4/4  Results")
    _write_results(out, variants)
    _say(f"\nDone in {time.monotonic() - start:.0f} s. Next, try:")
    program, run = _program(), variants[0].folder
    _say(f"  {program} generate {run} --prompt 'The array' --tokens 80")
    _say(f"  {program} inspect {run}")
    _say(f"  {program} plan configs/runs/gpt2-small-ttm64.toml --world 8")
    return EXIT_DONE


def _write_results(out: Path, variants: Sequence[Variant]) -> None:
    table = markdown_table(variants)
    text = held_out_text(variants[0].folder)
    xz_bits = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / max(len(text), 1)
    yardstick = (
        f"xz -9e needs {xz_bits:.3f} bits per byte for the same {len(text):,} held-out bytes "
        "(it has seen no training text: a yardstick, not a rival)."
    )
    plot, samples, summary = out / "loss.png", out / "samples.txt", out / "results.md"
    plot_curves(variants, plot, "demo: TTM GPT-2 and its dense twin")
    sampling = Sampling(max_new_tokens=60, temperature=0.7, top_p=0.95)
    written = [
        f"[{prompt}] {generate_texts(variants[0].folder, None, prompt, sampling, 1)[0]}"
        for prompt in PROMPTS
    ]
    samples.write_text("\n\n".join(written) + "\n", encoding="utf-8")
    summary.write_text(f"{table}\n\n{yardstick}\n", encoding="utf-8")
    _say(f"{table}\n\n{yardstick}\n")
    _say("The TTM model writes:\n" + "\n".join(f"  {line}" for line in written))
    _say(f"\nLoss curves: {plot}\nTable:       {summary}\nTexts:       {samples}")


def _program() -> str:
    """Return how the command line is called from here: it may lie in an environment of its own."""
    program = Path(sys.executable).with_name("mpotrain")
    if shutil.which("mpotrain") is not None or not program.is_file():
        return "mpotrain"
    return os.path.relpath(program)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 (the demo talks to its user)
