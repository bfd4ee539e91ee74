"""What the benchmark of experts has to reach, on both sides of every bound."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.moe_tables import targets

EXPERTS = (8, 32, 128)
HALF = ("asymmetric, half bonds", "ours, auto (factored)")
FULL = ("asymmetric, full central", "ours, auto (factored)")
DENSE = ("dense experts", "torch grouped_mm")
REBUILT = ("asymmetric, full central", "rebuilt, torch grouped_mm")
MERGED = ("published shape, full bonds", "ours, grouped, merged in bf16")
RELEASED = ("published shape, full bonds", "released way")
GOOD = {HALF: 0.25, FULL: 1.0, DENSE: 4.0, REBUILT: 8.0, MERGED: 2.0, RELEASED: 4.0}
"""Times over nn.Linear that keep to every bound with room to spare."""
BAD = {HALF: 9.0, FULL: 9.0, DENSE: 0.1, REBUILT: 0.1, MERGED: 9.0, RELEASED: 0.1}
"""Times that keep to none."""


def results(
    num_experts: int = 0, key: tuple[str, str] = HALF, ratio: float = 0.0
) -> list[dict[str, Any]]:
    """Good rows with one exception; in fp32, where nothing is asked, all are bad."""
    rows = []
    for count in EXPERTS:
        for (layer, name), good in GOOD.items():
            row = {"num_experts": count, "layer": layer, "name": name}
            changed = (count, (layer, name)) == (num_experts, key)
            rows.append({**row, "dtype": "fp32", "ratio": BAD[layer, name]})
            rows.append({**row, "dtype": "bf16", "ratio": ratio if changed else good})
    return rows


def missed(rows: list[dict[str, Any]]) -> list[str]:
    return [target.text for target in targets(rows) if not target.is_met]


CASES = [
    *((count, HALF, 0.6, True, ("half bonds", f"E = {count}")) for count in EXPERTS),
    *((count, FULL, 1.5, True, ("full central", f"E = {count}")) for count in EXPERTS),
    (32, DENSE, 2 * GOOD[HALF], False, ("half bonds", "faster than dense")),
    (32, REBUILT, 2 * GOOD[FULL], False, ("full central", "faster than rebuilt")),
    (8, MERGED, 2.84, True, ("published shape", "over nn.Linear")),
    (8, RELEASED, GOOD[MERGED], False, ("published shape", "over the released way")),
]


def test_good_results_meet_everything_and_bad_ones_nothing() -> None:
    assert missed(results()) == []
    bad = [{**row, "ratio": BAD[row["layer"], row["name"]]} for row in results()]
    assert len(missed(bad)) == len(CASES)
    assert len(targets(results())) == len(CASES)


@pytest.mark.parametrize(("num_experts", "key", "bound", "most", "words"), CASES)
def test_both_sides_of_a_bound(
    num_experts: int, key: tuple[str, str], bound: float, most: bool, words: tuple[str, ...]
) -> None:
    better, worse = (0.999, 1.001) if most else (1.001, 0.999)
    assert missed(results(num_experts, key, bound)) == []
    assert missed(results(num_experts, key, bound * better)) == []
    (text,) = missed(results(num_experts, key, bound * worse))
    assert all(word in text for word in words)


def test_speed_is_asked_of_every_number_of_experts_in_the_results() -> None:
    rows = results()
    extra = [{**row, "num_experts": 64} for row in rows if row["num_experts"] == 128]
    (half,) = (row for row in extra if (row["layer"], row["dtype"]) == (HALF[0], "bf16"))
    half["ratio"] = 0.7
    (text,) = missed([*rows, *extra])
    assert "half bonds" in text
    assert "E = 64" in text


@pytest.mark.parametrize(
    ("num_experts", "key"),
    [(8, HALF), (32, HALF), (128, FULL), (32, DENSE), (32, REBUILT), (8, MERGED), (8, RELEASED)],
)
def test_a_missing_result_is_no_success(num_experts: int, key: tuple[str, str]) -> None:
    rows = [
        row
        for row in results()
        if (row["num_experts"], row["dtype"], (row["layer"], row["name"]))
        != (num_experts, "bf16", key)
    ]
    with pytest.raises(KeyError, match=f"E = {num_experts}, bf16, {key[0]}"):
        targets(rows)
