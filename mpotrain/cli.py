"""The command line: sub-commands, their options, and errors as people want to read them.

Heavy libraries are imported inside the handlers, so that `--help`, `plan` and `config` answer at
once. Every handler returns the exit code (see `mpotrain.errors`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

# Notes who started this process, while that one lives: imports that follow take seconds.
import mpotrain.parallel.watch  # noqa: F401
from mpotrain import __version__, handlers
from mpotrain.errors import EXIT_DONE, ConfigError, MpotrainError
from mpotrain.preflight.arguments import DESCRIPTION, add_arguments

Handler = Callable[[argparse.Namespace], int]

EPILOG = """\
exit codes: 0 done; 1 unexpected error; 2 bad configuration, data, checkpoint or command line;
3 training stopped by the policy for NaN, infinity and loss spikes; 4 a file could not be written;
85 stopped on request after a checkpoint: run the same command to go on;
86 ended because no rank made progress any more: run the same command to go on
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program name; default: those of the process.
    """
    arguments = [
        argument
        for argument in (sys.argv[1:] if argv is None else argv)
        # The deepspeed launcher and old torchrun inject it; the environment says the same.
        if not argument.startswith(("--local_rank", "--local-rank", "--no_local_rank"))
    ]
    parser = _parser()
    # argparse reads positional arguments in one run only; overrides may stand behind options too.
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all(map(_is_override, rest))):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    handler: Handler = options.handler
    try:
        return handler(options)
    except MpotrainError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        print(_message(error, "" if rank == "0" else f"rank {rank}: "), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output (`| head`) has left: nothing is wrong.
        sys.stderr.close()
        return EXIT_DONE


def entry() -> NoReturn:
    """Run the command line as a process of its own, and end it."""
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Back ends of torch.distributed leave threads behind that now and then abort a process
        # while it is torn down; all files are closed, and the launcher must see our exit code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _message(error: MpotrainError, rank: str) -> str:
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return "\n".join([f"{rank}{len(error.problems)} problems:", *error.problems])
    return f"{rank}error: {error}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpotrain",
        description="Pretraining of language models whose weight matrices are tensor networks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mpotrain {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_plan(commands)
    add_arguments(_command(commands, "preflight", DESCRIPTION, handlers.preflight))
    _add_convert(commands)
    _add_export(commands)
    _add_train(commands)
    _add_tune(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_inspect(commands)
    _add_config(commands)
    _add_demo(commands)
    return parser


Commands = argparse._SubParsersAction  # the type that add_subparsers returns has no public name


def _command(
    commands: Commands[argparse.ArgumentParser], name: str, text: str, handler: Handler
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(handler=handler)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run file (TOML)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        default=[],
        help="settings laid over the run file",
    )


def _add_prepare(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands, "prepare", "Turn raw text into token shards, with a tokenizer.", handlers.prepare
    )
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="text, jsonl, parquet or csv files, folders, globs, hf:NAME[:SUBSET], "
        "installed:stdlib,torch,numpy",
    )
    parser.add_argument(
        "--synthetic",
        choices=["markov", "stories", "positions"],
        help="a generator with a known answer instead of a source",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="existing sentencepiece .model, tokenizer.json or prepared folder",
    )
    parser.add_argument("--eot", help="name of the token that ends a document")
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="pieces of a tokenizer trained on the text (default 8192)",
    )
    parser.add_argument("--model-type", choices=["unigram", "bpe"], default="unigram")
    parser.add_argument("--text-column", default="text", metavar="NAME")
    parser.add_argument("--per-line", action="store_true", help="every line is a document")
    parser.add_argument("--hub-split", default="train", metavar="NAME")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="read at most this much text")
    parser.add_argument(
        "--documents", type=int, default=20_000, metavar="N", help="documents of a synthetic source"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=1_000_000,
        metavar="N",
        help="tokens of a synthetic token source",
    )
    parser.add_argument("--seed", type=int, default=0, help="of a synthetic source")
    parser.add_argument("--documents-per-shard", type=int, default=8192, metavar="N")
    parser.add_argument("--workers", type=int, metavar="N", help="tokenizing processes")


def _add_plan(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "plan",
        "Weigh a run without running it: parameters, contraction plans, FLOPs, memory, traffic, "
        "problems. Needs no GPU; exits with 2 on problems.",
        handlers.plan,
    )
    _add_run(parser)
    parser.add_argument("--world", type=int, default=1, metavar="N", help="number of processes")
    parser.add_argument(
        "--device",
        help="device profile of the cost model (default: h200, or cpu where engine.device is cpu)",
    )
    parser.add_argument(
        "--sites", action="store_true", help="also print every contraction, operation by operation"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_convert(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "convert",
        "Write a trained model as step 0 into the folder of a new run, which `train` goes on with: "
        "matrices dense or tensorized, layers shared or not, experts made of feed-forward layers.",
        handlers.convert,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="run folder or checkpoint, folder of a Hugging Face GPT-2, ALBERT, BERT or T5 "
        "(safetensors), or hf:NAME[@REVISION]",
    )
    _add_run(parser)
    parser.add_argument(
        "--to",
        choices=["gpt2", "encoder", "t5", "mpo-moe"],
        required=True,
        help="a network of the kind of SOURCE as RUN describes it, or one with mixtures of experts",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step of SOURCE")
    _add_tolerance(parser)
    parser.add_argument(
        "--allow-truncation",
        action="store_true",
        help="write even if truncated bonds lose more than that",
    )


def _add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "export",
        "Write a trained model as a folder that transformers loads: GPT-2, ALBERT, BERT or T5 with "
        "dense matrices.",
        handlers.export,
    )
    _add_checkpoint(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--to", choices=["huggingface"], default="huggingface", help="the format (default)"
    )
    _add_tolerance(parser)


def _add_tolerance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="X",
        help="largest difference of scores over the largest score (default 1e-5)",
    )


def _add_train(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "train",
        "Train, or go on from the newest complete checkpoint of the run folder. One process, or "
        "every rank of a world started by torchrun, deepspeed or srun.",
        handlers.train,
    )
    _add_run(parser)
    _add_start(parser)


def _add_tune(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "tune",
        "Fine-tune a pretrained encoder for classification, or go on from the newest complete "
        "checkpoint of the run folder. One process, or every rank of a launched world.",
        handlers.tune,
    )
    _add_run(parser)
    parser.add_argument(
        "--method", choices=["full"], default="full", help="which weights learn: all of them"
    )
    _add_start(parser)


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start from nothing; refused where the run folder has a run",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record a few steps with torch.profiler into the run folder",
    )
    parser.add_argument(
        "--allow-data-change",
        action="store_true",
        help="go on although the data differ from those of the checkpoint",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="run folder, or one checkpoint (.../step-00000100)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step")


def _add_eval(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "eval", "Held-out loss of a checkpoint.", handlers.evaluate)
    _add_checkpoint(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        default=[],
        help="settings laid over those of the checkpoint",
    )
    parser.add_argument("--split", choices=["train", "validation", "test"], default="validation")
    parser.add_argument("--sequences", type=int, metavar="N", help="at most this many")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_generate(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "generate", "Let a checkpoint write.", handlers.generate)
    _add_checkpoint(parser)
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens to write")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts to write")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check-stories",
        action="store_true",
        help="count the texts that the checker of `prepare --synthetic stories` accepts",
    )


def _add_inspect(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "inspect",
        "Show a run folder, a checkpoint (cores, bonds, entanglement) or prepared data.",
        handlers.inspect,
    )
    _add_checkpoint(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_config(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("config", help="Show, compare and describe run files.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    show = _command(actions, "show", "Print the resolved run file.", handlers.config_show)
    _add_run(show)
    diff = _command(
        actions, "diff", "Print what differs between two run files.", handlers.config_diff
    )
    diff.add_argument("left", type=Path)
    diff.add_argument("right", type=Path)
    _command(actions, "schema", "Print the JSON schema of run files.", handlers.config_schema)


def _add_demo(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "demo",
        "Pretrain a small tensorized GPT-2 and its dense twin on text found on this machine.",
        handlers.demo,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    parser.add_argument("--steps", type=int, metavar="N", help="fewer or more steps")
