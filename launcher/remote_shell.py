"""What DeepSpeed's ssh launcher would let a shell of another host interpret.

It joins working directory, arguments and variables to one line for that shell without quoting
them. Nothing can be quoted from outside, so what the shell would not take literally is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

CARRIED = ("NCCL", "PYTHON", "MV2", "UCX", "MLFLOW", "LD_LIBRARY", "PATH")
"""Beginnings of the names of variables that DeepSpeed 0.19 takes along."""
_LITERAL = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_ACTIVE = re.compile(r"[$`\"\\\n]")
"""What is not literal between double quotes, into which DeepSpeed puts values of variables."""


def remote_problems(argv: Sequence[str], folder: Path, environ: Mapping[str, str]) -> list[str]:
    """Return what a shell of another host would not take literally.

    Args:
        argv: command of DeepSpeed's launcher.
        folder: working directory.
        environ: environment of the command.
    """
    advice = "start each host by hand with --node-rank, which needs no shell"
    found = [
        f"command line: {word!r} would be read by a shell on the other hosts, which does not take "
        f"it literally; {advice}"
        for word in argv
        if not _LITERAL.fullmatch(word)
    ]
    if not _LITERAL.fullmatch(str(folder)):
        found.append(
            f"working directory: {str(folder)!r} would be read by a shell on the other hosts, "
            f"which does not take it literally; {advice}"
        )
    found += [
        f"environment: the value of {name} would be read by a shell on the other hosts, which does "
        f"not take it literally; unset it, or {advice}"
        for name, value in environ.items()
        if name.startswith(CARRIED) and _ACTIVE.search(value)
    ]
    return found


def dropped_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the names of variables that other hosts will not see.

    Args:
        environment: variables that ranks should have.
    """
    return sorted(name for name in environment if not name.startswith(CARRIED))
