"""From a merged TOML table to a configuration object, with every mistake at once (no torch).

Everything here works for any class made by `mpotrain.schema.config` that also has a method
`problems()`: the files of pretraining runs and those of fine-tuning runs are read by one loader.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, get_args, get_origin

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mpotrain.config_parts import adapter_of, as_json, member_of, problems_of_sound_parts
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import LayeredTable
from mpotrain.schema import to_dict


class Checked(Protocol):
    """A configuration that knows its own contradictions."""

    def problems(self) -> list[str]:
        """Return everything that is wrong, one line each, beginning with the dotted key."""


T = TypeVar("T", bound=Checked)


def validate(kind: type[T], table: LayeredTable) -> T:
    """Turn a merged table into a configuration.

    Args:
        kind: class of the whole configuration.
        table: what the files and the command line say.

    Returns:
        The validated object.

    Raises:
        ConfigError: with every mistake of form (unknown keys, wrong types) and every mistake of
            content that can be told without reading a key of the wrong form, each with its file
            and dotted key. Sections are held against each other where both have the right form.
    """
    _name_kinds(kind, table.data)
    try:
        found: T = adapter_of(kind).validate_json(as_json(table.data))
    except ValidationError as error:
        form = [_explain(detail, kind, table) for detail in error.errors(include_url=False)]
        content = problems_of_sound_parts(kind, table)
        raise ConfigError(_located([*form, *content], kind, table)) from error
    if problems := found.problems():
        raise ConfigError(_located(problems, kind, table))
    return found


def _located(lines: Sequence[str], kind: type[Any], table: LayeredTable) -> list[str]:
    """Put lines that begin with dotted keys in the order of the file's sections, with their files.

    Keys that the files do not set come last, in the order of the class.
    """
    order = [*table.data, *(field.name for field in dataclasses.fields(kind))]

    def place(line: str) -> int:
        section = re.split(r"[.\[:]", line, maxsplit=1)[0]
        return order.index(section) if section in order else len(order)

    return [f"{table.source_of(_key_of(line))}: {line}" for line in sorted(lines, key=place)]


def _key_of(line: str) -> str:
    """Return the dotted key that a line is about, without places in lists."""
    return re.sub(r"\[\d+\]", "", line.partition(":")[0])


def _name_kinds(kind: type[Any], data: dict[str, Any]) -> None:
    """Write the default's `kind` into tables of tagged unions that name none.

    So `train.optimizer.weight_decay=0.1` alone is enough where the default optimizer is meant.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        inner = data.get(field.name)
        if not isinstance(inner, dict):
            continue
        default = getattr(field.default, "kind", None)
        if default is not None:
            inner.setdefault("kind", default)
        member = member_of(hints[field.name], inner)
        if dataclasses.is_dataclass(member) and isinstance(member, type):
            _name_kinds(member, inner)


def dump(configuration: object) -> str:
    """Return a resolved configuration as TOML that reads back to an equal object."""
    return tomli_w.dumps(to_dict(configuration))


def leaves(configuration: object) -> dict[str, Any]:
    """Return a resolved configuration as dotted keys in order; lists are leaves."""
    found: dict[str, Any] = {}

    def walk(value: Any, at: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{at}.{key}" if at else key)
        else:
            found[at] = value

    walk(to_dict(configuration), "")
    return found


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """Return the JSON schema of a configuration class (without `extends`)."""
    return adapter_of(kind).json_schema()


def _explain(detail: ErrorDetails, kind: type[Any], table: LayeredTable) -> str:
    """Turn one pydantic error into `dotted.key: what is wrong`."""
    path = _key_path(detail["loc"], table.data)
    dotted = ".".join(path)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _fields_at(kind, path[:-1], table.data)
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
        return f"{dotted}: unknown key{hint}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{dotted}: required, but not set"
    shown = repr(detail["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{dotted or 'run file'}: {message}, got {shown}"


def _key_path(location: tuple[int | str, ...], data: Any) -> list[str]:
    """Drop the tags that pydantic puts into the location of a member of a union."""
    path = []
    for part in location:
        if isinstance(data, dict) and part not in data and part == data.get("kind"):
            continue
        path.append(str(part))
        if isinstance(data, dict):
            data = data.get(str(part))
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
    return path


def _fields_at(kind: type[Any], path: Sequence[str], data: Any) -> list[str]:
    """Return the field names of the section at `path`, following tagged unions by their `kind`."""
    current: Any = kind
    for part in path:
        if part.isdigit():
            current = get_args(current)[0]
            data = data[int(part)]
        elif get_origin(current) is dict:
            current = get_args(current)[1]
            data = data[part]
        else:
            current = typing.get_type_hints(current, include_extras=True)[part]
            data = data.get(part, {})
        current = member_of(current, data)
    return [field.name for field in dataclasses.fields(current)]
