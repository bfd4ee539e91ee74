"""What `prepare` can read: local files, `hf:` data sets, `installed:` prose, `synthetic:` data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpotrain.data import files, harvest, synthetic
from mpotrain.data.config import PrepareConfig
from mpotrain.errors import DataError

TOKEN_KINDS = ("markov", "positions")
"""Synthetic sources that are token ids; they need no tokenizer."""


@dataclass(frozen=True)
class TextSource:
    """Raw documents in a fixed order.

    Attributes:
        description: for people, in manifest and messages.
        fingerprint: changes whenever the documents may have changed; plain data.
        documents: starts a new pass over the documents; empty ones included.
        num_bytes: size of the text where it is known beforehand (progress bar), else None.
    """

    description: str
    fingerprint: dict[str, Any]
    documents: Callable[[], Iterator[str]]
    num_bytes: int | None = None


def token_kind(config: PrepareConfig) -> str | None:
    """Return which synthetic token source the settings name, or None for text.

    Raises:
        DataError: a token source stands beside other sources.
    """
    tokens = [kind for kind in TOKEN_KINDS if f"synthetic:{kind}" in config.sources]
    if not tokens:
        return None
    if len(config.sources) > 1:
        raise DataError(
            f"source synthetic:{tokens[0]} is token ids already and cannot share a folder with "
            "other sources; prepare it into a folder of its own"
        )
    return tokens[0]


def token_source(kind: str, config: PrepareConfig) -> synthetic.TokenSource:
    """Make a synthetic token source.

    Args:
        kind: one of `TOKEN_KINDS`.
        config: size and seed.
    """
    if kind == "markov":
        return synthetic.markov(config.num_tokens, config.seed)
    return synthetic.positions(config.num_documents, config.seed)


def token_fingerprint(kind: str, config: PrepareConfig) -> dict[str, Any]:
    """Return what decides the content of a synthetic token source; plain data."""
    size = "num_tokens" if kind == "markov" else "num_documents"
    return {"kind": kind, "seed": config.seed, size: getattr(config, size)}


def open_sources(config: PrepareConfig) -> list[TextSource]:
    """Resolve the text sources of a `prepare` call; local files are digested.

    Args:
        config: which sources, text column, lines or files, seed.

    Returns:
        The sources in the order given.

    Raises:
        DataError: a source does not exist or its name cannot be understood.
    """
    return [_open_source(spec, config) for spec in config.sources]


def _open_source(spec: str, config: PrepareConfig) -> TextSource:
    kind, _, rest = spec.partition(":")
    openers = {"hf": _hub, "installed": _installed, "synthetic": _stories}
    if kind in openers:
        return openers[kind](rest, config)
    path = Path(spec).expanduser()
    if files.is_saved_dataset(path):
        return _saved(path, config)
    return _local(spec, config)


def _local(spec: str, config: PrepareConfig) -> TextSource:
    found = files.find_files(spec)
    marks = files.fingerprint(found)
    size = marks["num_bytes"] / 1e6
    return TextSource(
        description=f"{spec} ({len(found)} files, {size:,.1f} MB)",
        fingerprint={**marks, "text_column": config.text_column, "per_line": config.per_line},
        documents=lambda: files.read_files(
            found, text_column=config.text_column, per_line=config.per_line
        ),
        num_bytes=files.plain_text_bytes(found),
    )


def _saved(path: Path, config: PrepareConfig) -> TextSource:
    parts = sorted(file for file in path.rglob("*") if file.is_file())

    def documents() -> Iterator[str]:
        datasets = files.quiet_datasets()
        try:
            table = datasets.load_from_disk(str(path))
        except Exception as error:  # the library raises many kinds
            reason = files.first_line(error)
            raise DataError(f"{path} cannot be read as a saved data set: {reason}") from error
        if isinstance(table, dict):
            if config.hub_split not in table:
                raise DataError(
                    f"{path} has no split {config.hub_split!r}; it has {', '.join(table)}"
                )
            table = table[config.hub_split]
        yield from files.column_texts(table, config.text_column, str(path))

    return TextSource(
        description=f"{path} (saved data set, split {config.hub_split})",
        fingerprint={
            **files.fingerprint(parts),
            "text_column": config.text_column,
            "split": config.hub_split,
        },
        documents=documents,
    )


def _hub(name: str, config: PrepareConfig) -> TextSource:
    name, _, revision = name.partition("@")
    name, _, subset = name.partition(":")
    if not name:
        raise DataError("source hf: names no data set; write hf:OWNER/NAME[:SUBSET][@REVISION]")

    def documents() -> Iterator[str]:
        datasets = files.quiet_datasets()
        try:
            table = datasets.load_dataset(
                name,
                subset or None,
                split=config.hub_split,
                revision=revision or None,
                streaming=True,
            )
            yield from files.column_texts(table, config.text_column, f"hf:{name}")
        except DataError:
            raise
        except Exception as error:  # network, hub and reader errors of many kinds
            raise DataError(
                f"hf:{name}: cannot be loaded from the hub: {files.first_line(error)}. Check the "
                "name, subset and split; without a network, download the files elsewhere and name "
                "them (or a folder written by save_to_disk) as the source"
            ) from error

    marks = {"kind": "hub", "name": name, "subset": subset, "revision": revision}
    columns = {"text_column": config.text_column, "split": config.hub_split}
    return TextSource(
        description=f"hf:{name} {subset or 'default'} {revision or 'newest'} {config.hub_split}",
        fingerprint={**marks, **columns},
        documents=documents,
    )


def _installed(names: str, config: PrepareConfig) -> TextSource:
    packages = [name.strip() for name in names.split(",") if name.strip()]
    if not packages:
        raise DataError("source installed: names no package; write installed:stdlib,torch,numpy")
    return TextSource(
        description=f"documentation of installed packages: {', '.join(packages)}",
        fingerprint={
            "kind": "installed",
            "packages": packages,
            "digest": harvest.digest(packages),
        },
        documents=lambda: harvest.harvest(packages),
    )


def _stories(kind: str, config: PrepareConfig) -> TextSource:
    if kind != "stories":
        known = ", ".join(f"synthetic:{name}" for name in ("stories", *TOKEN_KINDS))
        raise DataError(f"source synthetic:{kind} is not known; there are {known}")
    return TextSource(
        description=f"synthetic stories ({config.num_documents:,} documents, seed {config.seed})",
        fingerprint={"kind": "stories", "num": config.num_documents, "seed": config.seed},
        documents=lambda: synthetic.stories(config.num_documents, config.seed),
    )


def documents_of(sources: Iterable[TextSource], max_bytes: int | None) -> Iterator[str]:
    """Yield the documents of all sources, one source after another.

    Args:
        sources: in order.
        max_bytes: stop before the document that would bring the text above this size.
    """
    total = 0
    for source in sources:
        for text in source.documents():
            total += 0 if max_bytes is None else len(text.encode("utf-8", "replace"))
            if max_bytes is not None and total > max_bytes:
                return
            yield text
