"""Tables of text for terminals and logs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

_NODE = re.compile(r"(.*?)(\d+)")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "") -> str:
    """Return aligned columns under headings.

    Args:
        headings: of the columns.
        rows: cells, as many in each row as there are headings.
        right: headings of columns that are aligned to the right, with spaces between.

    Returns:
        Lines without spaces at their ends. Control characters in cells are shown as `?`: a name
        in a file must not be able to steer a terminal.
    """
    lines = [[printable(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_right = {index for index, name in enumerate(headings) if name in right.split()}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in to_right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def printable(text: str) -> str:
    """Return a text in one line without control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)


def shortened(text: str, width: int) -> str:
    """Return a text cut to a width, with three points where something is missing."""
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def short_number(number: float) -> str:
    """Return a rate in three digits: `950`, `12.3k`, `1.5M`."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


def short_age(seconds: float) -> str:
    """Return an age in its largest units: `12s`, `3m`, `2h05m`, `4d03h`; clocks may disagree."""
    left = max(0, int(seconds))
    if left < 60:
        return f"{left}s"
    minutes = left // 60
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02}m"
    return f"{hours // 24}d{hours % 24:02}h"


def short_nodes(nodes: Sequence[str]) -> str:
    """Return node names in SLURM's short form: `node[1-3,7],login`.

    Args:
        nodes: names; a number at the end is what is counted.
    """
    split = []
    for node in nodes:
        match = _NODE.fullmatch(node)
        split.append((match[1], match[2]) if match else (node, ""))
    parts = []
    # Numbers of another width (`n9`, `n010`) are another series.
    for (prefix, width), group in groupby(split, key=lambda part: (part[0], len(part[1]))):
        numbers = [number for _, number in group]
        if not width:
            parts += [prefix] * len(numbers)
        elif len(numbers) == 1:
            parts.append(f"{prefix}{numbers[0]}")
        else:
            parts.append(f"{prefix}[{_ranges(numbers)}]")
    return ",".join(parts)


def _ranges(numbers: Sequence[str]) -> str:
    found = []
    ordered = sorted(numbers)
    for _, group in groupby(enumerate(ordered), key=lambda pair: int(pair[1]) - pair[0]):
        run = [number for _, number in group]
        found.append(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(found)
