"""A configuration of which some keys have the wrong form: what its other parts say (no torch).

Such a configuration cannot be built, but all of its sound keys can be read. Here it becomes an
object of its own class in which reading an unsound key raises `UnsoundKeyError`; checks that are
given to `mpotrain.schema.collect_problems` one by one then say what they can say, and no more.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from mpotrain.layered_toml import LayeredTable
from mpotrain.schema import UnsoundKeyError, collect_problems

T = TypeVar("T")

_ADAPTERS: dict[tuple[Any, str], TypeAdapter[Any]] = {}
"""By type and key. Building one costs up to a tenth of a second; they live as long as we do."""


def adapter_of(kind: Any, key: str = "") -> TypeAdapter[Any]:
    """Return what validates and describes a type, or the value of one key of a class."""
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
    alternatives = _alternatives(hint)
    members = [member for member in alternatives if dataclasses.is_dataclass(member)]
    kind = data.get("kind") if isinstance(data, dict) else None
    named = [member for member in members if kind in _tags(member)]
    return (named or members or alternatives)[0]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of a (tagged, optional, annotated) union; the one type of anything else."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _tags(member: Any) -> tuple[Any, ...]:
    """Return the values of `kind` that select a class; none where it has no such key."""
    return get_args(typing.get_type_hints(member).get("kind"))


def problems_of_sound_parts(kind: type[Any], table: LayeredTable) -> list[str]:
    """Return the mistakes of content in a table that also has mistakes of form.

    What holds sections against each other sees only those without any mistake of form. In a section
    with one, checks that do not read the unsound key still speak, and so in tables of sections or
    values and in lists of sections. Another list is sound or unsound as a whole.

    Args:
        kind: class of the whole configuration, with a method `problems()`.
        table: what the files and the command line say.

    Returns:
        One line for each, beginning with the dotted key.
    """
    part = _read(kind, table.data, table, "")
    tables = {name: inner for name, inner in part.damaged.items() if isinstance(inner, dict)}
    sections = {name: inner for name, inner in part.damaged.items() if name not in tables}
    whole = _build(kind, part.sound | tables, {*part.unsound, *sections})
    found = collect_problems(whole.problems)
    for name, section in sections.items():
        if hasattr(section, "problems"):
            found += collect_problems(partial(section.problems, name))
    return found


@dataclasses.dataclass(frozen=True)
class _Part:
    """The keys of one section.

    Attributes:
        sound: values of the keys without mistakes of form.
        damaged: sections and tables below this one that have some, as far as they can be read.
        unsound: keys with nothing to read.
    """

    sound: dict[str, Any]
    damaged: dict[str, Any]
    unsound: set[str]


def _read(
    kind: type[Any],
    data: Mapping[str, Any],
    table: LayeredTable,
    at: str,
    others: Iterable[Any] = (),
) -> _Part:
    """Tell the keys of a section apart.

    Args:
        kind: class of the section.
        data: its table, which does not validate.
        table: knows which keys somebody has set.
        at: dotted key of the section, with a point behind it.
        others: classes that another `kind` would have selected.
    """
    wrong = _wrong_keys(kind, data)
    hints = _hints(kind)
    part = _Part({}, {}, set())
    # A key with a typing error in its name looks like a foreign one beside one left out.
    foreign = wrong - hints.keys()
    misspelt = bool(foreign)
    for field in dataclasses.fields(kind):
        name = field.name
        if name in wrong:
            section = _damaged(hints[name], data.get(name), table, f"{at}{name}")
            if section is None:
                part.unsound.add(name)
            else:
                part.damaged[name] = section
        elif misspelt and not table.sets(f"{at}{name}"):
            if name == "kind" and not _means_other_kind(foreign, kind, others):
                part.sound[name] = data.get(name, _default(field))
            else:
                part.unsound.add(name)
        elif name in data:
            # It has been found right strictly; this only turns arrays and tables into objects.
            part.sound[name] = adapter_of(kind, name).validate_json(as_json(data[name]))
        else:
            part.sound[name] = _default(field)
    return part


def _means_other_kind(foreign: Iterable[str], kind: type[Any], others: Iterable[Any]) -> bool:
    """Whether unknown keys of a section without `kind` say that it is not of the default kind.

    Args:
        foreign: the unknown keys.
        kind: class of the section by default.
        others: classes that another `kind` would have selected.
    """
    own = {field.name for field in dataclasses.fields(kind)} - {"kind"}
    telling = {"kind", *(field.name for other in others for field in dataclasses.fields(other))}
    telling -= own
    for key in foreign:
        meant = difflib.get_close_matches(key, [*own, *telling], n=1)
        if telling.intersection(meant) or difflib.get_close_matches(key, ["kind"]):
            return True
    return False


def _wrong_keys(kind: type[Any], data: Mapping[str, Any]) -> set[str]:
    try:
        adapter_of(kind).validate_json(as_json(data))
    except ValidationError as error:
        return {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
    return set()


def _damaged(hint: Any, data: Any, table: LayeredTable, at: str) -> Any | None:
    """Return a section or table with mistakes of form; None where nobody can tell what it is."""
    if isinstance(data, list):
        return _read_list(hint, data, table, at)
    if not isinstance(data, dict):
        return None
    if get_origin(hint) is dict:
        return _read_values(get_args(hint)[1], data, table, at)
    member = member_of(hint, data)
    if not (isinstance(member, type) and dataclasses.is_dataclass(member)):
        return None
    others = [
        other
        for other in _alternatives(hint)
        if other is not member and dataclasses.is_dataclass(other)
    ]
    part = _read(member, data, table, f"{at}.", others)
    if "kind" in part.unsound:
        return None  # it may have been meant to be another class
    return _build(member, part.sound | part.damaged, part.unsound)


def _read_values(
    hint: Any, data: Mapping[str, Any], table: LayeredTable, at: str
) -> _PartlySound[Any]:
    """Return a table whose names are free, of which some values have mistakes of form."""
    return _PartlySound(
        {name: _read_value(hint, value, table, f"{at}.{name}") for name, value in data.items()}
    )


def _read_list(
    hint: Any, data: Sequence[Any], table: LayeredTable, at: str
) -> _PartlySoundList | None:
    """Return a list of sections of which some have mistakes of form; None for other lists."""
    section, *rest = get_args(hint) or [None]
    if rest != [...] or not dataclasses.is_dataclass(section):
        return None
    # Only whole lists are known to have been set: here all that stands in them has been.
    inner = LayeredTable()
    inner.merge({str(index): value for index, value in enumerate(data)}, table.source_of(at))
    return _PartlySoundList(
        [_read_value(section, value, inner, str(index)) for index, value in enumerate(data)]
    )


def _read_value(hint: Any, value: Any, table: LayeredTable, at: str) -> Any | None:
    try:
        return adapter_of(hint).validate_json(as_json(value))
    except ValidationError:
        return _damaged(hint, value, table, at)


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


class _PartlySound(dict[str, T]):
    """A table in which some values cannot be read (None, which TOML does not have).

    Its names can be told; whoever reads an unsound value has nothing to say, and so has who reads
    all of them.
    """

    def __getitem__(self, name: str) -> T:
        value = super().__getitem__(name)
        if value is None:
            raise UnsoundKeyError(name)
        return value

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


class _PartlySoundList(Sequence[Any]):
    """A list of sections, likewise."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        if self._values[index] is None:
            raise UnsoundKeyError(str(index))
        return self._values[index]


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
