"""The one decorator behind every configuration section (torch is never imported here).

A section is a frozen, keyword-only dataclass that stands beside the code it configures. pydantic
validates it at the boundary (`mpotrain.config`): strict numbers, unknown keys forbidden. The
string under a field is its documentation and its text in the JSON schema.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict

T = TypeVar("T")
Check = Callable[[], Iterable[str]]
"""A check that can be made without others: it says what is wrong."""

STRICT = ConfigDict(
    extra="forbid",
    strict=True,
    use_attribute_docstrings=True,
    allow_inf_nan=False,
)


class UnsoundKeyError(Exception):
    """A check reads a key whose form is wrong, so it has nothing to say until that is mended."""


def collect_problems(*checks: Check) -> list[str]:
    """Return what checks have to say, each of which can be made without the others.

    Args:
        checks: functions that return problems; one that reads a key whose form is wrong
            (`UnsoundKeyError`) has said nothing, and the others are made all the same.

    Returns:
        The lines of all checks in order.
    """
    found: list[str] = []
    for check in checks:
        try:
            found += list(check())
        except UnsoundKeyError:
            continue
    return found


def sound_or(read: Callable[[], T], instead: T) -> T:
    """Return a value of a configuration, or another one where the form of its key is wrong.

    Args:
        read: reads the key.
        instead: a value beside which checks that are given it have nothing to say about the key.
    """
    try:
        return read()
    except UnsoundKeyError:
        return instead


def known_size(read: Callable[[], int]) -> int | None:
    """Return a size; None where it is itself wrong, so that nothing is held against it.

    Args:
        read: reads the size.
    """
    size = sound_or(read, 0)
    return size if size >= 1 else None


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Turn a class into a configuration section.

    Args:
        cls: a class with annotated fields; tagged unions carry `kind: Literal["..."] = "..."`.

    Returns:
        The frozen, keyword-only dataclass; unknown keys are refused when pydantic builds it.
    """
    cls.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def to_dict(section: Any) -> dict[str, Any]:
    """Return a configuration section as plain dicts and lists, without `None` entries.

    Args:
        section: an instance of a class made by `config`.

    Returns:
        Nested dicts and lists that TOML and JSON can hold; `None` (absent in TOML) is left out.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {name: plain(item) for name, item in fields if item is not None}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items() if item is not None}
        return value

    result: dict[str, Any] = plain(section)
    return result
