"""Merging of TOML layers, provenance and overrides."""

from pathlib import Path

import pytest

from mpotrain.errors import ConfigError
from mpotrain.layered_toml import LayeredTable, parse_override, read_layers


def test_extends_merges_in_order_and_remembers_who_set_what(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[t]\nx = 1\ny = 2\n[t.u]\nkind = "k"\nz = 3\n')
    (tmp_path / "b.toml").write_text("[t]\ny = 5\n")
    run = tmp_path / "run.toml"
    run.write_text('extends = ["a.toml", "b.toml"]\n[t]\nw = 9\n')
    table = read_layers(run, ["t.x=7"])
    assert table.data == {"t": {"x": 7, "y": 5, "w": 9, "u": {"kind": "k", "z": 3}}}
    assert table.source_of("t.x") == "command line"
    assert table.source_of("t.y").endswith("b.toml")
    assert table.source_of("t.w").endswith("run.toml")
    assert table.source_of("t.u.z").endswith("a.toml")
    assert table.source_of("t.u.missing").endswith("a.toml")


def test_a_table_whose_kind_changes_is_replaced() -> None:
    table = LayeredTable()
    table.merge({"site": {"kind": "ttm", "rank": 16, "bias": False}}, "base")
    table.merge({"site": {"kind": "dense"}}, "run")
    assert table.data == {"site": {"kind": "dense"}}
    table.merge({"site": {"bias": True}}, "over")
    assert table.data == {"site": {"kind": "dense", "bias": True}}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.b=8", {"a": {"b": 8}}),
        ("a=3e-4", {"a": 3e-4}),
        ("a=fast", {"a": "fast"}),
        ("a=runs/x y", {"a": "runs/x y"}),
        ('a="q"', {"a": "q"}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ('s.t={kind="dense"}', {"s": {"t": {"kind": "dense"}}}),
        ("a=b=c", {"a": "b=c"}),
        ('a=say "hi" \\n', {"a": 'say "hi" \\n'}),
    ],
)
def test_override_values(line: str, expected: dict[str, object]) -> None:
    assert parse_override(line) == expected


@pytest.mark.parametrize("line", ["novalue", "=3", "a b=3", "a..b=3"])
def test_malformed_overrides_are_named(line: str) -> None:
    with pytest.raises(ConfigError, match="command line"):
        parse_override(line)


def test_a_whole_table_on_the_command_line_replaces(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[m.s]\nkind = "mpo"\ncap = 16\nbias = false\n')
    path = tmp_path / "a.toml"
    assert read_layers(path, ['m.s={kind="mpo", bonds=[9]}']).data == {
        "m": {"s": {"kind": "mpo", "bonds": [9]}}
    }
    merged = read_layers(path, ["m.s.cap=8", "m.new={x=1}", "n={y=2}"])
    assert merged.data["m"]["s"] == {"kind": "mpo", "cap": 8, "bias": False}
    assert merged.data["m"]["new"] == {"x": 1}
    assert merged.data["n"] == {"y": 2}


def test_missing_cyclic_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        read_layers(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text('extends = ["b.toml"]\n')
    (tmp_path / "b.toml").write_text('extends = ["a.toml"]\n')
    with pytest.raises(ConfigError, match="extends itself"):
        read_layers(tmp_path / "a.toml")
    (tmp_path / "c.toml").write_text("x = = 3\n")
    with pytest.raises(ConfigError, match=r"c\.toml: is not valid TOML.*line 1"):
        read_layers(tmp_path / "c.toml")
    (tmp_path / "d.toml").write_text('extends = ["gone.toml"]\n')
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read \(extended by .*d\.toml"):
        read_layers(tmp_path / "d.toml")
    (tmp_path / "e.toml").write_text("x = 1\nx = 2\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_layers(tmp_path / "e.toml")


def test_all_malformed_overrides_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("x = 1\n")
    with pytest.raises(ConfigError) as caught:
        read_layers(tmp_path / "a.toml", ["one", "=two", "x=3"])
    assert len(caught.value.problems) == 2
