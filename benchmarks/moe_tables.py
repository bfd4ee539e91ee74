"""Write the tables of ``benchmarks.moe`` into docs/benchmarks.md, from a result file.

Run it with ``python -m benchmarks.moe_tables [RESULT.json] [PAGE.md]``. Everything between the two
marker comments of the page is replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- moe tables: begin -->", "<!-- moe tables: end -->"
_HERE = Path(__file__).parent
_PUBLISHED = "published shape, full bonds"
_FULL, _HALF = "asymmetric, full central", "asymmetric, half bonds"

Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One thing that the layer has to reach.

    Attributes:
        text: what it says.
        measured: the figure.
        bound: what the figure is compared with.
        most: whether the bound is the most allowed, else the least.
    """

    text: str
    measured: float
    bound: float
    most: bool

    @property
    def is_met(self) -> bool:
        """Whether the figure keeps to the bound."""
        return self.measured <= self.bound if self.most else self.measured >= self.bound


def find(rows: Sequence[Record], num_experts: int, dtype: str, layer: str, name: str) -> Record:
    """Return the row of one candidate; `name` is the beginning of its name."""
    for row in rows:
        here = (row["num_experts"], row["dtype"], row["layer"])
        if here == (num_experts, dtype, layer) and row["name"].startswith(name):
            return row
    raise KeyError(f"no result for E = {num_experts}, {dtype}, {layer}, {name}")


def targets(rows: Sequence[Record]) -> list[Target]:
    """Return what has to be reached in bf16, with the measured figures."""
    found = []
    for num_experts in sorted({row["num_experts"] for row in rows}):
        for layer, bound in ((_HALF, 0.6), (_FULL, 1.5)):
            ratio = find(rows, num_experts, "bf16", layer, "ours, auto (factored)")["ratio"]
            text = f"{layer}, factored, E = {num_experts}: time over nn.Linear"
            found.append(Target(text, ratio, bound, most=True))
    half = find(rows, 32, "bf16", _HALF, "ours, auto (factored)")["ratio"]
    dense = find(rows, 32, "bf16", "dense experts", "torch grouped_mm")["ratio"]
    full = find(rows, 32, "bf16", _FULL, "ours, auto (factored)")["ratio"]
    rebuilt = find(rows, 32, "bf16", _FULL, "rebuilt, torch grouped_mm")["ratio"]
    merged = find(rows, 8, "bf16", _PUBLISHED, "ours, grouped, merged in bf16")["ratio"]
    released = find(rows, 8, "bf16", _PUBLISHED, "released way")["ratio"]
    return [
        *found,
        Target("half bonds, E = 32: times faster than dense experts", dense / half, 2.0, False),
        Target("full central, E = 32: times faster than rebuilt", rebuilt / full, 2.0, False),
        Target(
            "published shape, E = 8, merged in bf16: time over nn.Linear", merged, 2.84, most=True
        ),
        Target(
            "published shape, E = 8, merged in bf16: time over the released way",
            merged / released,
            1.0,
            most=True,
        ),
    ]


def markdown(result: Record) -> str:
    """Return head, one table for each dtype, and the targets."""
    rows, environment = result["rows"], result["environment"]
    versions = environment["versions"]
    lines = [
        f"{environment['device']}, torch {versions['torch']}, Python {environment['python']}; "
        f"{result['options']['tokens']:,} rows, {environment['threads']} thread, "
        f"{result['options']['rounds']} rounds; commit {environment['commit'][:12]}"
        f"{' (modified)' if environment['modified'] else ''}.",
    ]
    for dtype in result["options"]["dtypes"]:
        lines += ["", f"### {dtype}", "", *_table([r for r in rows if r["dtype"] == dtype])]
    lines += ["", "### What had to be reached (bf16)", "", "| | measured | bound | met |"]
    lines.append("|---|---|---|---|")
    for target in targets(rows):
        sign, met = "at most" if target.most else "at least", "yes" if target.is_met else "**no**"
        lines.append(f"| {target.text} | {target.measured:.2f} | {sign} {target.bound} | {met} |")
    return "\n".join(lines)


def _table(rows: Sequence[Record]) -> list[str]:
    counts = sorted({row["num_experts"] for row in rows})
    head = " | ".join(f"E = {count}" for count in counts)
    lines = [f"| experts | implementation | {head} |", "|---|---|" + "---|" * len(counts)]
    names = dict.fromkeys((row["layer"], row["name"]) for row in rows)
    for layer, name in sorted(names, key=lambda key: _order(rows, key[0])):
        cells = [_cell(rows, count, layer, name) for count in counts]
        lines.append(f"| {layer} | {name} | {' | '.join(cells)} |")
    return lines


def _order(rows: Sequence[Record], layer: str) -> int:
    return next(index for index, row in enumerate(rows) if row["layer"] == layer)


def _cell(rows: Sequence[Record], num_experts: int, layer: str, name: str) -> str:
    for row in rows:
        if (row["num_experts"], row["layer"], row["name"]) == (num_experts, layer, name):
            predicted = "" if row["predicted"] is None else f" ({row['predicted']:.2f})"
            peak, saved = row["peak_bytes"] / 2**20, row["saved_bytes"] / 2**20
            return f"{row['ratio']:.2f}{predicted} / {peak:.0f} / {saved:.0f}"
    return "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Replace the tables of the page."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    result = Path(given[0]) if given else _HERE / "results" / "moe-cpu.json"
    page = Path(given[1]) if len(given) > 1 else _HERE.parent / "docs" / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{page}: the lines {BEGIN} and {END} are missing")
    tables = markdown(json.loads(result.read_text(encoding="utf-8")))
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
