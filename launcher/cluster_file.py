"""Reading a cluster file so that a person gets every mistake in it in one go."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mpotrain.config_file import Checked, validate
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import LayeredTable, read_layers

SHIPPED = Path(__file__).resolve().parent.parent / "configs" / "clusters"
"""Cluster files of a work tree."""

T = TypeVar("T", bound=Checked)


def read_cluster_file(kind: type[T], path: Path, overrides: Sequence[str]) -> T:
    """Read, merge and validate a cluster file.

    Args:
        kind: class of the configuration.
        path: TOML file; may extend others.
        overrides: `dotted.key=value` lines.

    Raises:
        ConfigError: the file does not exist, or with every mistake of form in it and those of
            content in all keys whose form is right.
    """
    if not path.exists():
        raise ConfigError([_missing(path)])
    table = read_layers(path, overrides)
    try:
        return validate(kind, table)
    except ConfigError as error:
        if isinstance(error.__cause__, ValidationError):
            more = _content_problems(kind, table, error.__cause__)
            raise ConfigError([*error.problems, *more]) from error
        raise


def _missing(path: Path) -> str:
    text = f"{path}: does not exist"
    shipped = sorted(SHIPPED.glob("*.toml"))
    # A name without a folder: probably one of the examples was meant.
    if path.parent != Path() or not shipped:
        return f"{text}; name a cluster file (TOML)"
    for example in shipped:
        if path.stem == example.stem:
            return f"{text}; did you mean {example}?"
    names = ", ".join(example.name for example in shipped)
    return f"{text}; name a cluster file (TOML); those in {SHIPPED}: {names}"


def _content_problems(kind: type[T], table: LayeredTable, form: ValidationError) -> list[str]:
    """Return the mistakes of content in what is left without the keys whose form is wrong."""
    data, left_out = copy.deepcopy(table.data), []
    for detail in form.errors(include_url=False):
        if key := _take_out(data, detail["loc"]):
            left_out.append(re.compile(rf"\b{re.escape(key)}\b"))
    try:
        validate(kind, LayeredTable(data, table.sources))
    except ConfigError as error:
        if isinstance(error.__cause__, ValidationError):
            return []
        files = "|".join(re.escape(source) for source in set(table.sources.values()))
        texts = {line: re.sub(rf"^(?:{files}): ", "", line) for line in error.problems}
        # Nothing is held against the default of a key that the file sets.
        return [
            line for line, text in texts.items() if not any(key.search(text) for key in left_out)
        ]
    return []


def _take_out(data: dict[str, Any], location: tuple[int | str, ...]) -> str:
    """Delete what an error is about; a key that is missing takes its section along.

    Returns:
        Its dotted key; empty where there is nothing to delete.
    """
    path: list[str] = []
    outer, inner = data, data
    for part in map(str, location):
        if isinstance(inner, dict) and part in inner:
            path.append(part)
            outer, inner = inner, inner[part]
        elif not isinstance(inner, dict) or part != inner.get("kind"):
            break  # the tag of a union stands in the location, but is no key
    if path:
        del outer[path[-1]]
    return ".".join(path)
