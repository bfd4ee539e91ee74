"""Documents in local files: text, jsonl, csv and parquet, plain or compressed, in a fixed order."""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from mpotrain.data.manifest import MANIFEST_NAME, file_digest, json_digest
from mpotrain.errors import DataError

_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
_COMPRESSED = {*_OPENERS, ".zst"}
_TABLES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Suffixes that Hugging Face `datasets` reads, and the name of its reader."""
_LINES = {".jsonl", ".ndjson"}
"""Read here line by line: a reader that infers column types trips over fields that change type,
takes texts such as 2020-01-01 for dates, and cannot name the bad line."""
_TEXT = {".txt", ".text", ".md", ".rst"}
"""Suffixes of text inside a folder; a file named outright may have any suffix."""


def content_suffix(path: Path) -> str:
    """Return the suffix that tells what a file holds, below a compression suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder was written by `datasets`' own `save_to_disk`."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def find_files(spec: str) -> list[Path]:
    """Return the files that a path, folder or glob names, in a fixed order.

    Args:
        spec: a file of any suffix, a folder (searched for known suffixes, hidden names left out)
            or a glob with `*`, `?`, `[...]`, `**`.

    Raises:
        DataError: nothing is there, or the folder holds token shards.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        if (path / MANIFEST_NAME).is_file():
            raise DataError(f"source {spec}: is already prepared; train on it directly")
        known = _TEXT | set(_TABLES)
        found = [
            file
            for file in path.rglob("*")
            if file.is_file()
            and content_suffix(file) in known
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not found:
            raise DataError(f"source {spec}: the folder has no file ending in {sorted(known)}")
        return sorted(found, key=lambda file: file.relative_to(path).as_posix())
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    files = sorted((match for match in matches if match.is_file()), key=lambda m: m.as_posix())
    if not files:
        raise DataError(f"source {spec}: no such file, folder or match")
    return files


def fingerprint(files: list[Path]) -> dict[str, Any]:
    """Describe the content of files so that any change shows, wherever they lie.

    Args:
        files: in reading order.
    """
    names = [file.name for file in files]
    sizes = [file.stat().st_size for file in files]
    digests = [file_digest(file) for file in files]
    return {
        "kind": "files",
        "num_files": len(files),
        "num_bytes": sum(sizes),
        "digest": json_digest(list(zip(names, sizes, digests, strict=True))),
    }


def plain_text_bytes(files: list[Path]) -> int | None:
    """Return the size of the text, if it can be told without reading (all plain text files)."""
    plain = all(
        content_suffix(file) not in _TABLES and file.suffix.lower() not in _COMPRESSED
        for file in files
    )
    return sum(file.stat().st_size for file in files) if plain else None


def read_files(files: list[Path], *, text_column: str, per_line: bool) -> Iterator[str]:
    """Yield the documents of files one after another.

    Args:
        files: in reading order.
        text_column: column of tables that holds the text.
        per_line: every line of a text file is a document.

    Raises:
        DataError: a file is damaged, not UTF-8, or has no such column.
    """
    for file in files:
        reader = _TABLES.get(content_suffix(file))
        if content_suffix(file) in _LINES and file.suffix.lower() != ".zst":
            yield from _read_json_lines(file, text_column)
        elif reader is not None:
            yield from _read_table(file, reader, text_column)
        elif per_line:
            yield from _read_lines(file)
        else:
            yield _decode(_read_bytes(file), file, "").removeprefix("\ufeff")


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        raise DataError(f"{path}: text compressed with zstd is not supported; use .gz or .xz")
    stream: IO[bytes] = _OPENERS.get(suffix, open)(path, "rb")
    return stream


def _read_bytes(path: Path) -> bytes:
    try:
        with _open(path) as stream:
            return stream.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                text = _decode(line, path, f"line {number}, ")
                text = text.removeprefix("\ufeff") if number == 1 else text
                yield text.removesuffix("\n").removesuffix("\r")
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_json_lines(path: Path, column: str) -> Iterator[str]:
    first = True
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} holds {type(row).__name__}, not an object")
        if first:
            _require(column, row, str(path))
            first = False
        yield _text(row.get(column), column, f"{path}: line {number}")


def _decode(data: bytes, path: Path, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: {place}byte {error.start} is not UTF-8; convert the file (for example with "
            "`iconv -t utf-8`) or leave it out"
        ) from error


def _read_table(path: Path, reader: str, column: str) -> Iterator[str]:
    datasets = quiet_datasets()
    options: dict[str, Any] = {}
    if reader == "csv":
        # The text as it stands: `007` is no number and `NA` is not absent.
        options["converters"] = {column: str}
        options["keep_default_na"] = False
        options["sep"] = "\t" if content_suffix(path) == ".tsv" else ","
    with tempfile.TemporaryDirectory(prefix="mpotrain-") as cache:
        try:
            table = datasets.load_dataset(
                reader,
                data_files=[glob.escape(str(path.resolve()))],
                split="train",
                streaming=True,
                cache_dir=cache,
                **options,
            )
            yield from column_texts(table, column, str(path))
        except DataError:
            raise
        except Exception as error:  # each reader raises its own kinds
            raise DataError(f"{path} cannot be read as {reader}: {first_line(error)}") from error


def column_texts(rows: Any, column: str, where: str) -> Iterator[str]:
    """Yield one column of a `datasets` table; an absent value counts as an empty text.

    Args:
        rows: a (streaming) data set.
        column: name of the text column.
        where: file or data set for messages.

    Raises:
        DataError: no such column, or it holds something else than text.
    """
    names = rows.column_names
    if names is not None:
        _require(column, names, where)
        rows = rows.select_columns([column])
    for number, row in enumerate(rows):
        _require(column, row, where)
        yield _text(row[column], column, f"{where}: row {number}")


def _text(value: object, column: str, place: str) -> str:
    if not isinstance(value, str | None):
        raise DataError(f"{place}: column {column!r} holds {type(value).__name__}, not text")
    return value or ""


def _require(column: str, names: Iterable[str], where: str) -> None:
    names = list(names)
    if column not in names:
        raise DataError(
            f"{where}: has no column {column!r}; choose one of {', '.join(names)} as text_column"
        )


def quiet_datasets() -> Any:
    """Import `datasets` (late: it takes a second) without its progress bars and warnings."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
    return datasets


def first_line(error: BaseException) -> str:
    """Return the innermost cause of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no further word'}"
