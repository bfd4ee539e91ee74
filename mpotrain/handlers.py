"""What each sub-command does. Every handler returns its exit code (see `mpotrain.errors`).

Heavy libraries are imported inside the handlers, so that `--help`, `plan` and `config` answer at
once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from mpotrain.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError


def prepare(options: argparse.Namespace) -> int:
    """Prepare data."""
    from mpotrain.data.config import ExistingTokenizerConfig, PrepareConfig, SentencePieceConfig
    from mpotrain.data.prepare import prepare as run_prepare

    sources = list(options.sources)
    if options.synthetic:
        sources.append(f"synthetic:{options.synthetic}")
    if options.eot and not options.tokenizer:
        raise ConfigError(["command line: --eot: goes with --tokenizer FILE"])
    # The generator of stories has so few words that a larger vocabulary cannot be trained.
    vocab_size = 350 if options.synthetic == "stories" else 8192
    if options.vocab_size is not None:
        vocab_size = options.vocab_size
    config = PrepareConfig(
        sources=tuple(sources),
        out=options.out,
        tokenizer=ExistingTokenizerConfig(path=options.tokenizer, eot=options.eot)
        if options.tokenizer
        else SentencePieceConfig(model_type=options.model_type, vocab_size=vocab_size),
        text_column=options.text_column,
        per_line=options.per_line,
        hub_split=options.hub_split,
        max_bytes=options.max_bytes,
        num_documents=options.documents,
        num_tokens=options.tokens,
        seed=options.seed,
        documents_per_shard=options.documents_per_shard,
        num_workers=options.workers,
    )
    problems = config.problems("prepare")
    if problems:
        raise ConfigError([f"command line: {_as_option(line)}" for line in problems])
    manifest = run_prepare(config, progress=sys.stderr.isatty())
    print(
        f"{options.out}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
        f"{manifest.num_bytes:,} bytes of text, vocabulary {manifest.tokenizer.vocab_size:,}, "
        f"{len(manifest.shards)} shard(s), digest {manifest.digest}"
    )
    return EXIT_DONE


OPTION_NAMES = {
    "tokenizer.vocab_size": "--vocab-size",
    "tokenizer.path": "--tokenizer",
    "sources": "SOURCE",
    "out": "--out",
    "max_bytes": "--max-bytes",
    "num_documents": "--documents",
    "num_tokens": "--tokens",
    "documents_per_shard": "--documents-per-shard",
    "num_workers": "--workers",
    "seed": "--seed",
}
"""Fields of `PrepareConfig` as the command line calls them."""


def _as_option(problem: str) -> str:
    key, colon, rest = problem.removeprefix("prepare.").partition(":")
    return f"{OPTION_NAMES.get(key, key)}{colon}{rest}"


def plan(options: argparse.Namespace) -> int:
    """Weigh a run."""
    from mpotrain.config import load_config
    from mpotrain.report.sites import render_operations
    from mpotrain.report.text import render
    from mpotrain.report.weigh import weigh
    from mpotrain.tensor.plan import PROFILES

    if options.device not in (None, *PROFILES):
        raise ConfigError(
            [f"command line: --device {options.device}: known are {', '.join(PROFILES)}"]
        )
    if options.world < 1:
        raise ConfigError([f"command line: --world {options.world}: must be at least 1"])
    try:
        run = load_config(options.run, options.overrides)
    except ConfigError as error:
        if options.json:
            print(json.dumps({"problems": error.problems}, indent=2))
        raise
    report = weigh(run, options.world, options.device)
    print(json.dumps(report.to_json(), indent=2) if options.json else render(report))
    if options.sites and not options.json:
        print(render_operations(run, report.device))
    return EXIT_BAD_INPUT if report.problems else EXIT_DONE


def preflight(options: argparse.Namespace) -> int:
    """Check the nodes of a world, as one of its ranks."""
    from mpotrain.preflight.arguments import options_of
    from mpotrain.preflight.run import preflight as run_preflight
    from mpotrain.preflight.text import describe

    result = run_preflight(options_of(options), os.environ)
    if result.summary is not None:  # one rank speaks for all
        print(json.dumps(result.summary, indent=2) if options.json else describe(result.summary))
    return EXIT_DONE if result.ok else EXIT_BAD_INPUT


def convert(options: argparse.Namespace) -> int:
    """Write a trained model as step 0 of a run."""
    from mpotrain.config import load_config

    _require_tolerance(options.tolerance)
    run = load_config(options.run, options.overrides)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return EXIT_DONE  # one process writes
    from mpotrain.convert.conversion import convert as run_convert

    result = run_convert(
        options.source,
        options.step,
        run,
        options.to,
        tolerance=options.tolerance,
        allow_truncation=options.allow_truncation,
    )
    print(result.describe())
    return EXIT_DONE


def _require_tolerance(tolerance: float) -> None:
    if not tolerance >= 0:
        raise ConfigError(
            [f"command line: --tolerance {tolerance}: must be a number of at least 0"]
        )


def export(options: argparse.Namespace) -> int:
    """Write a trained model as a Hugging Face folder."""
    _require_tolerance(options.tolerance)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return EXIT_DONE  # one process writes
    from mpotrain.convert.export import export as run_export

    result = run_export(options.folder, options.step, options.out, tolerance=options.tolerance)
    print(result.describe())
    return EXIT_DONE


def train(options: argparse.Namespace) -> int:
    """Train as one rank of a world."""
    from mpotrain.config import load_config

    # The run file is checked before torch is imported: a typing error answers at once.
    run = load_config(options.run, options.overrides)
    from mpotrain.pretrain import train as run_train

    return run_train(
        run,
        fresh=options.fresh,
        profile=options.profile,
        allow_data_change=options.allow_data_change,
    )


def tune(options: argparse.Namespace) -> int:
    """Fine-tune as one rank of a world."""
    from mpotrain.tune.config import load_tune_config

    run = load_tune_config(options.run, options.overrides)
    from mpotrain.tune.run import tune as run_tune

    return run_tune(
        run,
        fresh=options.fresh,
        profile=options.profile,
        allow_data_change=options.allow_data_change,
    )


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate a checkpoint."""
    from mpotrain.trained import evaluate_checkpoint

    result = evaluate_checkpoint(
        options.folder, options.step, options.overrides, options.split, options.sequences
    )
    if result is None:  # not the first rank
        return EXIT_DONE
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print(result.describe())
    return EXIT_DONE


def generate(options: argparse.Namespace) -> int:
    """Let a checkpoint write."""
    from mpotrain.generate import Sampling
    from mpotrain.trained import generate_texts

    sampling = Sampling(
        max_new_tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return EXIT_DONE  # one process writes
    problems = sampling.problems()
    if any("\ud800" <= character <= "\udfff" for character in options.prompt):
        problems.append("prompt: is not valid UTF-8")
    if options.samples < 1:
        problems.append(f"samples: must be at least 1, is {options.samples}")
    if not 0 <= options.seed < 2**63:
        problems.append(f"seed: must be in [0, 2^63), is {options.seed}")
    if problems:
        raise ConfigError([f"command line: --{line}" for line in problems])
    texts = generate_texts(options.folder, options.step, options.prompt, sampling, options.samples)
    for number, text in enumerate(texts):
        if options.samples > 1:
            print(f"--- {number + 1} ---")
        print(text)
    if options.check_stories:
        from mpotrain.data.stories import check_story

        accepted = sum(map(check_story, texts))
        print(f"{accepted} of {len(texts)} texts accepted by the checker of stories")
    return EXIT_DONE


def inspect(options: argparse.Namespace) -> int:
    """Show a checkpoint or prepared data."""
    from mpotrain.trained import inspect_folder

    data, text = inspect_folder(options.folder, options.step)
    print(json.dumps(data, indent=2) if options.json else text)
    return EXIT_DONE


def config_show(options: argparse.Namespace) -> int:
    """Print the resolved run file."""
    from mpotrain.config import dump_config, load_config

    print(dump_config(load_config(options.run, options.overrides)), end="")
    return EXIT_DONE


def config_diff(options: argparse.Namespace) -> int:
    """Print what differs between two run files."""
    from mpotrain.config import flatten, load_config

    left, right = flatten(load_config(options.left)), flatten(load_config(options.right))
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            print(f"{key}: {_shown(left, key)} -> {_shown(right, key)}")
    return EXIT_DONE


def _shown(leaves: dict[str, object], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else "(absent)"


def config_schema(options: argparse.Namespace) -> int:
    """Print the JSON schema of run files."""
    from mpotrain.config import config_schema

    del options
    print(json.dumps(config_schema(), indent=2))
    return EXIT_DONE


def demo(options: argparse.Namespace) -> int:
    """Run the demo."""
    from mpotrain.demo import demo as run_demo

    return run_demo(options.out, options.steps)
