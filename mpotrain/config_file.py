"""From a merged TOML table to a configuration object, with every mistake at once (no torch).

Everything here works for any class made by `mpotrain.schema.config` that also has a method
`problems()`: the files of pretraining runs and those of fine-tuning runs are read by one loader.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_origin

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from mpotrain.errors import ConfigError
from mpotrain.layered_toml import LayeredTable
from mpotrain.schema import to_dict


class Checked(Protocol):
    """A configuration that knows its own contradictions."""

    def problems(self) -> list[str]:
        """Return everything that is wrong, one line each, beginning with the dotted key."""


T = TypeVar("T", bound=Checked)

_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}
"""Building one costs a tenth of a second; each class has its own for the life of the process."""


def validate(kind: type[T], table: LayeredTable) -> T:
    """Turn a merged table into a configuration.

    Args:
        kind: class of the whole configuration.
        table: what the files and the command line say.

    Returns:
        The validated object.

    Raises:
        ConfigError: with every mistake of form (unknown keys, wrong types) and, where the form is
            right, every mistake of content, each with its file and dotted key.
    """
    _name_kinds(kind, table.data)
    try:
        # JSON mode takes arrays for tuples and stays strict about numbers.
        found: T = _adapter(kind).validate_json(json.dumps(table.data, default=_refuse))
    except ValidationError as error:
        raise ConfigError(
            [_explain(detail, kind, table) for detail in error.errors(include_url=False)]
        ) from error
    problems = found.problems()
    if problems:
        located = [f"{table.source_of(line.partition(':')[0])}: {line}" for line in problems]
        raise ConfigError(located)
    return found


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
        member = _member(hints[field.name], inner)
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
    return _adapter(kind).json_schema()


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _refuse(value: object) -> str:
    """Write dates as text, which no field accepts silently; TOML has no other foreign types."""
    return f"{type(value).__name__} {value}"


def _explain(detail: ErrorDetails, kind: type[Any], table: LayeredTable) -> str:
    """Turn one pydantic error into `file: dotted.key: what is wrong`."""
    path = _key_path(detail["loc"], table.data)
    dotted = ".".join(path)
    source = table.source_of(dotted)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _fields_at(kind, path[:-1], table.data)
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
        return f"{source}: {dotted}: unknown key{hint}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{source}: {dotted}: required, but not set"
    shown = repr(detail["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{source}: {dotted or 'run file'}: {message}, got {shown}"


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
        else:
            current = typing.get_type_hints(current, include_extras=True)[part]
            data = data.get(part, {})
        current = _member(current, data)
    return [field.name for field in dataclasses.fields(current)]


def _member(hint: Any, data: Any) -> Any:
    """Return the member of a (tagged, optional, annotated) union that `data` selects."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    members = [member for member in get_args(hint) if dataclasses.is_dataclass(member)]
    kind = data.get("kind") if isinstance(data, dict) else None
    named = [m for m in members if kind in get_args(typing.get_type_hints(m).get("kind"))]
    return (named or members)[0]
