"""A configuration of which some keys have the wrong form: what its other parts say (no torch).

Such a configuration cannot be built, but all of its sound keys can be read. Here it becomes an
object of its own class in which reading an unsound key raises `UnsoundKeyError`; checks that are
given to `mpotrain.schema.collect_problems` one by one then say what they can say, and no more.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from mpotrain.layered_toml import LayeredTable
from mpotrain.schema import UnsoundKeyError, collect_problems

T = TypeVar("T")

_ADAPTERS: dict[tuple[type[Any], str], TypeAdapter[Any]] = {}
"""By class and key. Building one costs up to a tenth of a second; they live as long as we do."""


def adapter_of(kind: type[Any], key: str = "") -> TypeAdapter[Any]:
    """Return what validates and describes a configuration class, or the value of one key of it."""
    if (kind, key) not in _ADAPTERS:
        hint = _hints(kind)[key] if key else kind
        _ADAPTERS[kind, key] = TypeAdapter(hint)
    return _ADAPTERS[kind, key]


def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def as_json(data: object) -> str:
    """Return TOML values as JSON, of which pydantic takes arrays for tuples, strict elsewhere."""
    return json.dumps(data, default=_refuse)


def _refuse(value: object) -> str:
    """Write dates as text, which no field accepts silently; TOML has no other foreign types."""
    return f"{type(value).__name__} {value}"


def member_of(hint: Any, data: Any) -> Any:
    """Return the member of a (tagged, optional, annotated) union that `data` selects."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    members = [member for member in get_args(hint) if dataclasses.is_dataclass(member)]
    kind = data.get("kind") if isinstance(data, dict) else None
    named = [member for member in members if kind in _tags(member)]
    return (named or members or get_args(hint))[0]


def _tags(member: Any) -> tuple[Any, ...]:
    """Return the values of `kind` that select a class; none where it has no such key."""
    return get_args(typing.get_type_hints(member).get("kind"))


def problems_of_sound_parts(kind: type[Any], table: LayeredTable) -> list[str]:
    """Return the mistakes of content in a table that also has mistakes of form.

    What holds sections against each other sees only those without any mistake of form. In a section
    with one, checks that do not read the unsound key still speak.

    Args:
        kind: class of the whole configuration, with a method `problems()`.
        table: what the files and the command line say.

    Returns:
        One line for each, beginning with the dotted key.
    """
    part = _read(kind, table.data, table, "")
    whole = _build(kind, part.sound, {*part.unsound, *part.damaged})
    found = collect_problems(whole.problems)
    for name, section in part.damaged.items():
        if hasattr(section, "problems"):
            found += collect_problems(partial(section.problems, name))
    return found


@dataclasses.dataclass(frozen=True)
class _Part:
    """The keys of one section.

    Attributes:
        sound: values of the keys without mistakes of form.
        damaged: sections below this one that have some, as far as they can be read.
        unsound: keys with nothing to read.
    """

    sound: dict[str, Any]
    damaged: dict[str, Any]
    unsound: set[str]


def _read(kind: type[Any], data: Mapping[str, Any], table: LayeredTable, at: str) -> _Part:
    """Tell the keys of a section apart.

    Args:
        kind: class of the section.
        data: its table, which does not validate.
        table: knows which keys somebody has set.
        at: dotted key of the section, with a point behind it.
    """
    wrong = _wrong_keys(kind, data)
    hints = _hints(kind)
    part = _Part({}, {}, set())
    # A key with a typing error in its name looks like a foreign one beside one left out.
    misspelt = not wrong <= hints.keys()
    for field in dataclasses.fields(kind):
        name = field.name
        if name in wrong:
            section = _damaged(hints[name], data.get(name), table, f"{at}{name}")
            if section is None:
                part.unsound.add(name)
            else:
                part.damaged[name] = section
        elif misspelt and not table.sets(f"{at}{name}"):
            part.unsound.add(name)
        elif name in data:
            # It has been found right strictly; this only turns arrays and tables into objects.
            part.sound[name] = adapter_of(kind, name).validate_json(as_json(data[name]))
        else:
            part.sound[name] = _default(field)
    return part


def _wrong_keys(kind: type[Any], data: Mapping[str, Any]) -> set[str]:
    try:
        adapter_of(kind).validate_json(as_json(data))
    except ValidationError as error:
        return {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
    return set()


def _damaged(hint: Any, data: Any, table: LayeredTable, at: str) -> Any | None:
    """Return a section with mistakes of form; None where it cannot be told what it is."""
    member = member_of(hint, data)
    if not (isinstance(data, dict) and isinstance(member, type)):
        return None
    if not dataclasses.is_dataclass(member):
        return None
    part = _read(member, data, table, f"{at}.")
    if "kind" in part.unsound:
        return None  # it may have been meant to be another class
    return _build(member, part.sound | part.damaged, part.unsound)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _build(kind: type[T], values: Mapping[str, Any], unsound: Iterable[str]) -> T:
    """Return an object of a subclass of `kind` in which some keys cannot be read."""
    blocked = {name: _Unsound(name) for name in unsound}
    partly: type[T] = type(kind.__name__, (kind,), {**_WHOLE, **blocked})
    found = object.__new__(partly)
    for name, value in values.items():
        object.__setattr__(found, name, value)
    return found


class _Unsound:
    """Stands in place of a key that cannot be read, above the default of the class."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type[object] | None = None) -> _Unsound:
        if instance is None:
            return self
        raise UnsoundKeyError(self._name)


def _as_whole(self: object, *_: object) -> NoReturn:
    """Refuse what would read all keys: comparing, hashing and showing."""
    raise UnsoundKeyError(type(self).__name__)


_WHOLE: dict[str, Any] = dict.fromkeys(("__eq__", "__hash__", "__repr__"), _as_whole)
