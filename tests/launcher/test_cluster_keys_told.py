"""docs/clusters.md: every key of a cluster file stands in its table, numbers with their default."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from launch_fakes import ROOT

from launcher.cluster import ClusterConfig
from launcher.containers import ApptainerContainer, NoContainer, PyxisContainer

TEXT = (ROOT / "docs" / "clusters.md").read_text()
TABLE = re.search(r"^\| key \| default \|.*?\n\n", TEXT, re.DOTALL | re.MULTILINE)


def told() -> dict[str, str]:
    """Return the default by key as the table has it."""
    assert TABLE is not None
    found: dict[str, str] = {}
    for row in TABLE.group().strip().splitlines()[2:]:
        _, keys, defaults, *_ = (cell.strip() for cell in row.split("|"))
        names = re.findall(r"`([^`]+)`", keys)
        each = defaults.split(", ")
        found |= dict(
            zip(names, each if len(each) == len(names) else [defaults] * len(names), strict=True)
        )
    return found


def keys_of(section: type, where: str = "") -> Iterator[tuple[str, Any]]:
    for one in fields(section):
        default = one.default
        if is_dataclass(default) and not isinstance(default, NoContainer):
            yield from keys_of(type(default), f"{where}{one.name}.")
        else:
            yield f"{where}{one.name}", default


def test_every_key_is_told_with_its_default() -> None:
    keys, table = dict(keys_of(ClusterConfig)), told()
    assert set(table) == set(keys)
    numbers = {key: value for key, value in keys.items() if isinstance(value, bool | int | float)}
    assert numbers
    for key, value in numbers.items():
        assert table[key] == (str(value).lower() if isinstance(value, bool) else f"{value:g}"), key


def test_every_key_of_a_container_is_told() -> None:
    for kind in (ApptainerContainer, PyxisContainer):
        names = [one.name for one in fields(kind) if one.name != "kind"]
        tag = next(one.default for one in fields(kind) if one.name == "kind")
        assert tag is not MISSING
        assert f'`{{ kind = "{tag}", {", ".join(names)} }}`' in TEXT
