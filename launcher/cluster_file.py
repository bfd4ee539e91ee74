"""Reading a cluster file so that a person gets every mistake in it in one go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from mpotrain.config_file import Checked, validate
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import read_layers

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
        ConfigError: the file does not exist, or with every mistake in it.
    """
    if not path.exists():
        raise ConfigError([_missing(path)])
    return validate(kind, read_layers(path, overrides))


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
