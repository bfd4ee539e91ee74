"""What a kind of Hugging Face model is to us: settings and names, readable in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mpotrain.models.config import AnyModel

ConfigT = TypeVar("ConfigT", bound=AnyModel)

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Names of the approximation of GELU by tanh."""
ACTIVATIONS = dict.fromkeys(TANH_GELU, "gelu_tanh") | {"gelu": "gelu", "relu": "relu"}
"""Names of activations in `config.json`, and ours."""


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face file keeps one of our tensors.

    Attributes:
        name: its full name there.
        is_turned: whether it is stored transposed.
        also: further names of the same tensor (tied weights), which a file may hold as well or
            instead.
    """

    name: str
    is_turned: bool = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubFamily(Generic[ConfigT]):
    """A kind of Hugging Face model.

    Attributes:
        model_type: its name in `config.json`.
        label: its name for people.
        read: `config.json` to our sizes and representation, with everything that ours cannot
            compute, one line each; no configuration where there are such lines.
        write: our configuration to the keys of `config.json`.
        places: where each of our tensors is kept, by our names.
        base: module of the network within models with heads; files of the bare network lack it.
        ignored: names (without `base`) of tensors that hold nothing trained.
        older: endings of names in older files, and those of today.
        heads: beginnings of our names that make up one head each, which a file may lack.
    """

    model_type: str
    label: str
    read: Callable[[Mapping[str, Any]], tuple[ConfigT | None, list[str]]]
    write: Callable[[ConfigT], dict[str, Any]]
    places: Callable[[ConfigT], dict[str, Place]]
    base: str = ""
    ignored: re.Pattern[str] = re.compile(r"(?!)")
    older: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ()

    def take(
        self, config: ConfigT, tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Sort the tensors of a file under our names.

        Args:
            config: sizes of the model.
            tensors: name in the file and tensor.

        Returns:
            fp32 tensors by logical name, and everything that cannot be taken over, one line each.
        """
        places = self.places(config)
        owners = {n: ours for ours, place in places.items() for n in (place.name, *place.also)}
        found: dict[str, dict[str, Tensor]] = {}
        problems = []
        for given, tensor in tensors:
            if self.ignored.fullmatch(given.removeprefix(self.base)):
                continue
            name = self._full(given, owners)
            if name not in owners:
                problems.append(f"{given}: {self.label} has no such tensor")
            elif not tensor.is_floating_point():
                problems.append(f"{given}: {tensor.dtype}; only floating-point weights can be read")
            else:
                found.setdefault(owners[name], {})[name] = tensor.float()
        weights = {}
        for ours, copies in found.items():
            place = places[ours]
            main = place.name if place.name in copies else next(iter(copies))
            problems += [
                f"{name}: differs from {main}, but in our model they are one"
                for name, copy in copies.items()
                if name != main and not torch.equal(copy, copies[main])
            ]
            value = copies[main]
            weights[ours] = (value.t() if place.is_turned else value).contiguous()
        return weights, problems

    def fresh(self, config: ConfigT, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the names of the heads that a file lacks altogether."""
        wanted = [info.name for info in config.parameters()]
        lacking = [
            head for head in self.heads if not any(name.startswith(head) for name in weights)
        ]
        return tuple(name for name in wanted if name.startswith(tuple(lacking)))

    def give(self, config: ConfigT, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file, each under its main name there.

        Args:
            config: sizes of a dense model.
            weights: tensors by logical name.
        """
        # Copies: a file holds each tensor once, and layers may have one in common.
        return {
            place.name: (weights[ours].t() if place.is_turned else weights[ours]).clone(
                memory_format=torch.contiguous_format
            )
            for ours, place in self.places(config).items()
        }

    def _full(self, given: str, known: Collection[str]) -> str:
        """Return the name that a tensor has in today's files of a model with heads."""
        for old, new in self.older.items():
            if given.endswith(old):
                given = given.removesuffix(old) + new
        return given if given in known else self.base + given


def fixed_problems(found: Mapping[str, Any], fixed: Mapping[str, Any], label: str) -> list[str]:
    """Return the keys whose values our network does not leave open; absent ones are right."""
    return [
        f"{key}: is {found[key]!r}, our {label} has {value!r}"
        for key, value in fixed.items()
        if key in found and found[key] != value
    ]


def read_sizes(
    found: Mapping[str, Any], keys: Mapping[str, tuple[str, int]]
) -> tuple[dict[str, Any], list[str]]:
    """Return sizes under our names, and those that are none.

    Args:
        found: content of `config.json`.
        keys: our name to the key there and what an absent key means.
    """
    sizes = {ours: found.get(key, default) for ours, (key, default) in keys.items()}
    return sizes, size_problems(sizes)


def size_problems(sizes: Mapping[str, Any]) -> list[str]:
    """Return the sizes that are no numbers of at least 1."""
    return [
        f"{name}: is {size!r}, no number of at least 1"
        for name, size in sizes.items()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]


def alias_problems(found: Mapping[str, Any], aliases: Mapping[str, tuple[str, Any]]) -> list[str]:
    """Return a line for each second name of a size that says something else than the first.

    Args:
        found: content of `config.json`; transformers takes a second name for the first one.
        aliases: second names, each with the first one and what its absence means.
    """
    return [
        f"{alias}: is {found[alias]!r}, but {name} is {found.get(name, absent)!r}; one of them is "
        "wrong: leave the second name out"
        for alias, (name, absent) in aliases.items()
        if alias in found and found[alias] != found.get(name, absent)
    ]


def positive_problem(found: Mapping[str, Any], key: str) -> list[str]:
    """Return a line where a key is present and no positive number."""
    value = found.get(key, 1.0)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return []
    return [f"{key}: is {value!r}, no positive number"]
