"""The command line of the launcher: sub-commands, and errors as people want to read them.

A sub-command is a module with `add_arguments(parser)` and `main(options) -> int`; only the module
of the one that was asked for is imported.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import re
import sys
from collections.abc import Sequence

from mpotrain import __version__
from mpotrain.errors import EXIT_DONE, ConfigError, MpotrainError

COMMANDS = {
    "local": ("launcher.start_local", "Start a run as one process on this machine."),
    "torchrun": (
        "launcher.start_torchrun",
        "Start the ranks of this host through torchrun, alone or as one of several hosts.",
    ),
    "deepspeed": (
        "launcher.start_deepspeed",
        "Start the ranks of this host, or of all hosts of a hostfile, through DeepSpeed.",
    ),
    "slurm": (
        "launcher.slurm",
        "Weigh a run for a SLURM cluster and, if it can run there, submit it.",
    ),
    "status": ("launcher.status", "Show what the runs in a folder are doing."),
    "logs": ("launcher.logs", "Show the log of a run."),
    "stop": ("launcher.stop", "Ask a run to write a checkpoint and leave."),
    "cancel": ("launcher.cancel", "Take the jobs of a run out of the queue."),
    "sweep": ("launcher.sweep", "Submit the cross product of settings as one run each."),
    "batch": ("launcher.batch", "Run one life of a job (called by the batch script)."),
    "agent": ("launcher.agent", "Start the ranks of one node of a job (called by srun)."),
}
"""Module and description of every sub-command."""

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
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = arguments[0] if arguments else ""
    parser, command = _parsers(asked)
    # Before argparse, which would complain that the option which was misspelt is missing.
    if command is not None and (problems := unknown_options(arguments[1:], command.format_help())):
        command.error("; ".join(problems))
    # argparse reads positional arguments in one run only; overrides may stand behind options too.
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all(map(_is_override, rest))):
        (command or parser).error("; ".join(unknown_arguments(rest, options)))
    if rest:
        options.overrides = [*options.overrides, *rest]
    try:
        code: int = importlib.import_module(COMMANDS[asked][0]).main(options)
    except MpotrainError as error:
        print(_message(error), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output (`| head`) has left: nothing is wrong.
        sys.stderr.close()
        return EXIT_DONE
    return code


def unknown_options(arguments: Sequence[str], help_text: str) -> list[str]:
    """Return what is wrong with long options that a command does not have.

    Args:
        arguments: those of the command.
        help_text: its help, which names all its options.
    """
    known = sorted(set(re.findall(r"--[a-z][a-z-]*", help_text)))
    found = []
    for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
        name = argument.partition("=")[0]
        # argparse takes beginnings of options, too.
        if not name.startswith("--") or any(option.startswith(name) for option in known):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if not close and "." in name:
            hint = f"; settings have no dashes: {name.lstrip('-')}=VALUE"
        found.append(f"{name}: no such option{hint}")
    return found


def unknown_arguments(arguments: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Return what is wrong with arguments that nothing takes.

    Args:
        arguments: the arguments.
        options: what was understood of the command line.
    """
    if not hasattr(options, "overrides"):
        return [f"unrecognized arguments: {' '.join(arguments)}"]
    return [
        f"{argument}: no such option"
        if argument.startswith("-")
        else f"{argument!r}: is no setting; write key=value, such as train.steps=1000"
        for argument in arguments
        if not _is_override(argument)
    ]


def _parsers(asked: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """Return the parser, and that of the command that is asked for, where there is one."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher",
        description="Starts runs on this machine, on several hosts and on SLURM clusters.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mpotrain {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    found = None
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == asked:
            found = command
            importlib.import_module(module).add_arguments(command)
    return parser, found


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _message(error: MpotrainError) -> str:
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return "\n".join([f"{len(error.problems)} problems:", *error.problems])
    return f"error: {error}"
