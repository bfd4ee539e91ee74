"""Names of nodes as SLURM shortens them: `gpu[01-03,7],login` (no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_NAMES = 100_000


def expand_hostlist(text: str) -> tuple[str, ...]:
    """Return the single names in a list of hosts.

    Args:
        text: names separated by commas, with ranges of numbers in brackets, several in a name
            where a cluster has them; leading zeros count.

    Returns:
        The names in the order of the list; empty where the text is no such list.
    """
    names: list[str] = []
    for part in re.findall(r"(?:\[[^\]]*\]|[^,])+", text):
        expanded = _expand_name(part.strip())
        if expanded is None or len(names) + len(expanded) > MAX_NAMES:
            return ()
        names += expanded
    return tuple(names)


def step_nodes(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the nodes of this SLURM step, by number; empty outside of one."""
    keys = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    return expand_hostlist(next((environ[key] for key in keys if environ.get(key)), ""))


def _expand_name(name: str) -> list[str] | None:
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\](.*)", name)
    if match is None:
        return None if set("[]") & set(name) else [name]
    head, ranges, tail = match.groups()
    tails = _expand_name(tail)
    numbers = _expand_ranges(ranges)
    if tails is None or numbers is None:
        return None
    return [f"{head}{number}{rest}" for number in numbers for rest in tails]


def _expand_ranges(text: str) -> list[str] | None:
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= MAX_NAMES:
            return None
        numbers += [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
    return numbers
