"""Real prose without a download: the documentation inside the packages that are installed.

Docstrings are read from the source files with `ast`; no package is imported or run. The text
stays on the machine, so no licence question arises, but it differs between versions: fine for
demonstrations and comparisons, not for golden numbers. `digest` tells two finds apart.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from mpotrain.errors import DataError

STDLIB = "stdlib"
"""Name that stands for Python's standard library with its help topics."""

MIN_DOCUMENT_BYTES = 200
"""Documents shorter than this (a lone one-line docstring) are left out."""

_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "site-packages", "__pycache__"})
_ADDED_DOCS = frozenset({"add_docstr", "add_newdoc", "_add_docstr"})


@dataclass(frozen=True)
class SourceFile:
    """A Python file of an installed package.

    Attributes:
        name: dotted module name, e.g. `json.decoder`.
        path: where it is.
    """

    name: str
    path: Path


def find_files(packages: Sequence[str]) -> list[SourceFile]:
    """List the source files of installed packages, tests left out.

    Args:
        packages: top-level import names, or `stdlib`; a name given twice counts once.

    Returns:
        Files in the order of `packages`, within each by module name.

    Raises:
        DataError: a package is not installed or has no Python source.
    """
    found: list[SourceFile] = []
    for package in dict.fromkeys(packages):
        files: list[SourceFile] = []
        for prefix, root in _roots(package):
            files.extend(_python_files(prefix, root))
        if not files:
            raise DataError(f"source installed:{package}: the package has no Python source files")
        found.extend(sorted(files, key=lambda file: file.name))
    return found


def harvest(packages: Sequence[str], max_bytes: int | None = None) -> Iterator[str]:
    """Yield the documentation of installed packages, one document for each module.

    A document holds the docstrings of a module, its classes and its functions in the order of
    the file, each under its qualified name. A docstring that occurred before (in any module) is
    left out, and so is a document of less than `MIN_DOCUMENT_BYTES`.

    Args:
        packages: top-level import names, or `stdlib`.
        max_bytes: stop before the UTF-8 size of all documents exceeds this (the packages come in
            the order given, so a small limit may end within the first).

    Yields:
        Documents in a fixed order for fixed versions of the packages.

    Raises:
        DataError: a package is not installed or has no Python source.
    """
    seen: set[bytes] = set()
    total = 0
    for file in find_files(packages):
        for document in _documents(file, seen):
            size = len(document.encode())
            if size < MIN_DOCUMENT_BYTES:
                continue
            total += size
            if max_bytes is not None and total > max_bytes:
                return
            yield document


def digest(packages: Sequence[str]) -> str:
    """Fingerprint of what a harvest reads: names and contents of all source files.

    Args:
        packages: top-level import names, or `stdlib`.

    Returns:
        xxh3-128 in hexadecimal; equal digests mean equal harvests.

    Raises:
        DataError: a package is not installed or has no Python source.
    """
    state = xxhash.xxh3_128()
    for file in find_files(packages):
        state.update(file.name.encode() + b"\0")
        state.update(xxhash.xxh3_128_digest(file.path.read_bytes()))
    return state.hexdigest()


def _roots(package: str) -> list[tuple[str, Path]]:
    """Return (module name prefix, file or folder) pairs of a package, without importing it."""
    if package == STDLIB:
        return [("", Path(sysconfig.get_paths()["stdlib"]))]
    if not package.isidentifier():
        raise DataError(
            f"source installed:{package}: not a top-level import name such as 'numpy' "
            f"(or '{STDLIB}' for the standard library)"
        )
    spec = importlib.util.find_spec(package) if package not in sys.builtin_module_names else None
    if spec is None:
        raise DataError(
            f"source installed:{package}: no such package in {sys.prefix}; "
            "install it or leave it out"
        )
    if spec.submodule_search_locations:
        return [(package, Path(folder)) for folder in spec.submodule_search_locations]
    return [(package, Path(spec.origin))] if spec.has_location and spec.origin else []


def _python_files(prefix: str, root: Path) -> Iterator[SourceFile]:
    if root.is_file():
        if root.suffix == ".py":
            yield SourceFile(prefix, root)
        return
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED_FOLDERS.isdisjoint(parts):
            continue
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        yield SourceFile(".".join(part for part in (prefix, *parts) if part), path)


def _documents(file: SourceFile, seen: set[bytes]) -> Iterator[str]:
    """Yield the documents of one file: each help topic, or all docstrings joined."""
    tree = _parse(file.path)
    if tree is None:
        return
    if file.name == "pydoc_data.topics":
        yield from (text for text in _topics(tree) if _is_new(text, seen))
        return
    sections = [
        f"{name}\n\n{text}" for name, text in _docstrings(tree, file.name) if _is_new(text, seen)
    ]
    if sections:
        yield "\n\n\n".join(sections) + "\n"


def _parse(path: Path) -> ast.Module | None:
    """Return the syntax tree, or None for a file that is no Python of this version."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return None


def _is_new(text: str, seen: set[bytes]) -> bool:
    key = xxhash.xxh3_128_digest(text.encode())
    if key in seen:
        return False
    seen.add(key)
    return True


def _clean(text: str) -> str:
    # Lone surrogates are legal in a Python literal and illegal in UTF-8.
    return inspect.cleandoc(text).encode("utf-8", "replace").decode().rstrip()


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a module, class or function and of what it contains."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = _clean(ast.get_docstring(node, clean=False) or "")
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _added_docstring(child.value)
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _docstrings(child, name)


def _added_docstring(call: ast.Call) -> Iterator[tuple[str, str]]:
    """Yield what `add_docstr(torch.abs, "...")` gives to functions written in C."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else None
    function = call.func.id if isinstance(call.func, ast.Name) else function
    if function not in _ADDED_DOCS or not call.args:
        return
    owner = [ast.unparse(argument) for argument in call.args if isinstance(argument, ast.Attribute)]
    texts = [
        leaf.value
        for argument in call.args
        for leaf in ast.walk(argument)
        if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
    ]
    if texts and (text := _clean(max(texts, key=len))):
        path = [part for part in texts if all(map(str.isidentifier, part.split(".")))]
        yield ".".join(owner or path) or function, text


def _topics(tree: ast.Module) -> Iterator[str]:
    """Yield the texts behind `help("...")`: the dict that `pydoc_data.topics` assigns."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            yield from (_clean(topics[name]) + "\n" for name in sorted(topics))
