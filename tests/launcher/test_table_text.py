"""Tables and short numbers for people."""

from __future__ import annotations

from launcher.table import printable, short_age, short_nodes, short_number, table


def test_a_hostile_name_cannot_steer_the_terminal() -> None:
    text = table(["a", "b"], [["\x1b[2J\nx", "1"], ["y", "22"]], right="b")
    assert text.splitlines() == ["a        b", "?[2J?x   1", "y       22"]
    assert "\x1b" not in printable("\x1b\x9b\u202e")


def test_short_forms() -> None:
    assert [short_number(n) for n in (0.5, 950, 12_345, 1.5e6, 2e9)] == [
        "0.5", "950", "12.3k", "1.5M", "2G",
    ]  # fmt: skip
    assert [short_age(s) for s in (-5, 59, 61, 7500, 360_000)] == [
        "0s", "59s", "1m", "2h05m", "4d04h",
    ]  # fmt: skip
    assert short_nodes(["n1", "n2", "n3", "n7", "login", "n010"]) == "n[1-3,7],login,n010"
