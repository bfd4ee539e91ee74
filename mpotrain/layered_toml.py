"""TOML files that extend others, with `key=value` overrides, remembering who set what (no torch).

`extends = ["base.toml", ...]` names files relative to the extending file; they are merged in order,
then the file itself, then the overrides. Tables merge key by key, anything else is replaced; a
table whose `kind` changes is replaced as a whole, so that no field of the old kind survives.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpotrain.errors import ConfigError

OVERRIDE_SOURCE = "command line"


@dataclass
class LayeredTable:
    """A merged TOML document.

    Attributes:
        data: nested dicts of plain TOML values.
        sources: dotted key of every leaf -> the file (or "command line") that set it last.
    """

    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def source_of(self, key: str) -> str:
        """Return who set `key`, or its nearest parent or child that was set."""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            prefix = ".".join(parts[:end])
            if prefix in self.sources:
                return self.sources[prefix]
            inside = [s for k, s in self.sources.items() if k.startswith(prefix + ".")]
            if inside:
                return inside[-1]
        return next(iter(self.sources.values()), "run file")

    def sets(self, key: str) -> bool:
        """Return whether `key`, or a key below it, was set."""
        return any(known == key or known.startswith(f"{key}.") for known in self.sources)

    def merge(self, other: dict[str, Any], source: str) -> None:
        """Lay the table `other`, written in `source`, over this one."""
        self._merge_into(self.data, other, source, "")

    def override(self, line: str) -> None:
        """Lay one `dotted.key=value` over this table; a whole `{...}` replaces what was there.

        Raises:
            ConfigError: the line is malformed.
        """
        parsed = parse_override(line)
        keys, value = _key_of(parsed, line)
        if isinstance(value, dict):
            inner: Any = self.data
            for key in keys[:-1]:
                inner = inner.get(key, {}) if isinstance(inner, dict) else {}
            if isinstance(inner, dict) and isinstance(inner.get(keys[-1]), dict):
                del inner[keys[-1]]
                self._forget(".".join(keys))
        self.merge(parsed, OVERRIDE_SOURCE)

    def _merge_into(self, base: dict[str, Any], over: dict[str, Any], source: str, at: str) -> None:
        for key, value in over.items():
            dotted = f"{at}{key}"
            if not isinstance(value, dict):
                self._forget(dotted)
                base[key] = value
                self.sources[dotted] = source
                continue
            old = base.get(key)
            changes_kind = (
                isinstance(old, dict) and "kind" in value and value["kind"] != old.get("kind")
            )
            if not isinstance(old, dict) or changes_kind:
                self._forget(dotted)
                base[key] = {}
                self.sources[dotted] = source
            self._merge_into(base[key], value, source, f"{dotted}.")

    def _forget(self, dotted: str) -> None:
        for key in [k for k in self.sources if k == dotted or k.startswith(dotted + ".")]:
            del self.sources[key]


def read_layers(path: Path, overrides: Sequence[str] = ()) -> LayeredTable:
    """Read a run file with everything it extends, then apply overrides.

    Args:
        path: a TOML file.
        overrides: `dotted.key=value` lines; the value is TOML, a bare word is a string.

    Returns:
        The merged table and the origin of every value.

    Raises:
        ConfigError: a file is missing, is no TOML or extends itself; an override is malformed.
    """
    table = LayeredTable()
    _read_file(path, table, ())
    problems = []
    for line in overrides:
        try:
            table.override(line)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return table


def _read_file(path: Path, table: LayeredTable, open_files: tuple[Path, ...]) -> None:
    resolved = path.resolve()
    if resolved in open_files:
        chain = " -> ".join(str(p) for p in (*open_files, resolved))
        raise ConfigError([f"{path}: extends itself: {chain}"])
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        asked = f" (extended by {open_files[-1]})" if open_files else ""
        raise ConfigError([f"{path}: cannot be read{asked}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text: {error}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: is not valid TOML: {error}"]) from error
    extends = content.pop("extends", [])
    if not (isinstance(extends, list) and all(isinstance(item, str) for item in extends)):
        raise ConfigError([f"{path}: extends: must be a list of file names, is {extends!r}"])
    for name in extends:
        _read_file(path.parent / name, table, (*open_files, resolved))
    table.merge(content, str(path))


def parse_override(line: str) -> dict[str, Any]:
    """Parse `a.b=value` as TOML; a value that is no TOML (a bare word, a path) is a string.

    Raises:
        ConfigError: there is no `=`, or the key is no dotted key.
    """
    key, equals, value = line.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ConfigError([f"{OVERRIDE_SOURCE}: {line!r}: write dotted.key=value"])
    for candidate in (value, _quote(value)):
        try:
            return tomllib.loads(f"{key} = {candidate}")
        except tomllib.TOMLDecodeError:
            continue
    raise ConfigError([f"{OVERRIDE_SOURCE}: {line!r}: {key!r} is not a dotted key"])


def _key_of(parsed: dict[str, Any], line: str) -> tuple[list[str], Any]:
    """Return the keys of a parsed override, down to the value that stands behind `=`."""
    probe: Any = tomllib.loads(f"{line.partition('=')[0].strip()} = 0")
    keys, value = [], parsed
    while isinstance(probe, dict):
        (key,) = probe
        keys.append(key)
        probe, value = probe[key], value[key]
    return keys, value


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
