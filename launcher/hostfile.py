"""Hostfiles of DeepSpeed and MPI: one line `HOST slots=RANKS` for each host."""

from __future__ import annotations

import re
from pathlib import Path

from mpotrain.errors import ConfigError

_LINE = re.compile(r"(?P<host>[A-Za-z0-9][A-Za-z0-9_.:-]*)\s+slots=(?P<slots>\d+)")


def read_hostfile(path: Path) -> dict[str, int]:
    """Read a hostfile.

    Args:
        path: the file; what follows `#` on a line does not count.

    Returns:
        Ranks by host, in the order of the file.

    Raises:
        ConfigError: with every wrong line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ConfigError([f"{path}: the hostfile does not exist"]) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from error
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match["slots"]) < 1:
            problems.append(f"{path}: line {number}: {text!r} is not HOST slots=RANKS")
        elif match["host"] in hosts:
            problems.append(f"{path}: line {number}: {match['host']} is named twice")
        else:
            hosts[match["host"]] = int(match["slots"])
    if not hosts and not problems:
        problems.append(f"{path}: names no host")
    if problems:
        raise ConfigError(problems)
    return hosts
