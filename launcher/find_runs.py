"""Finding run folders: below a folder, or behind what a person named on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.run_folder import is_run
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import read_layers

MAX_DEPTH = 6
"""Levels below a named folder on which runs are looked for."""
MAX_FOLDERS = 20_000
"""Folders that are looked at before a search is given up: nobody means a whole file system."""


@dataclass(frozen=True)
class FoundRuns:
    """What a search has found.

    Attributes:
        folders: run folders, each once, sorted inside of each root.
        notes: what was not looked at, and why.
    """

    folders: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def find_runs(
    roots: Iterable[Path], *, max_depth: int = MAX_DEPTH, max_folders: int = MAX_FOLDERS
) -> FoundRuns:
    """Look for run folders in and below `roots`.

    A run folder is not searched for others. A link is followed to a run, but never searched, so
    that no loop of links can catch the search; hidden folders are left out.

    Args:
        roots: folders; a root may be a run itself.
        max_depth: levels below a root.
        max_folders: folders to look at in all.

    Raises:
        ConfigError: a root is no folder.
    """
    search = _Search(max_depth, max_folders)
    bad = []
    for root in roots:
        if root.is_dir():
            search.visit(root, 0)
        else:
            bad.append(f"{root}: {'is no folder' if root.exists() else 'does not exist'}")
    if bad:
        raise ConfigError(bad)
    if search.left <= 0:
        search.notes.append(
            f"the search stopped after {max_folders:,} folders; name a folder nearer to the runs"
        )
    return FoundRuns(tuple(search.found), tuple(search.notes))


class _Search:
    def __init__(self, max_depth: int, max_folders: int) -> None:
        self.found: list[Path] = []
        self.notes: list[str] = []
        self.left = max_folders
        self._max_depth = max_depth
        self._seen: set[tuple[int, int]] = set()

    def visit(self, folder: Path, depth: int) -> None:
        """Take a folder for a run, or look into it."""
        if self.left <= 0:
            return
        self.left -= 1
        try:
            if self._is_known(folder):
                return
            if is_run(folder):
                self.found.append(folder)
                return
            if depth >= self._max_depth:
                return
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if self._is_worth(entry))
        except OSError as error:
            self.notes.append(f"{folder}: cannot be read ({error.strerror or error})")
            return
        for name in names:
            self.visit(folder / name, depth + 1)

    def _is_known(self, folder: Path) -> bool:
        status = folder.stat()
        key = (status.st_dev, status.st_ino)
        known = key in self._seen
        self._seen.add(key)
        return known

    @staticmethod
    def _is_worth(entry: os.DirEntry[str]) -> bool:
        if entry.name.startswith("."):
            return False
        try:
            if entry.is_symlink():
                return entry.is_dir() and is_run(Path(entry.path))
            return entry.is_dir(follow_symlinks=False)
        except OSError:
            return False


def named_run(path: Path) -> Path:
    """Return the run folder that a person means by a path.

    Args:
        path: a run folder, or the file of a run.

    Raises:
        ConfigError: it is neither, or the run of the file was never started or submitted.
    """
    if path.is_file():
        folder = read_layers(path).data.get("folder")
        if not isinstance(folder, str) or not folder:
            raise ConfigError([f"{path}: has no `folder`: is it the file of a run?"])
        if not is_run(Path(folder)):
            raise ConfigError([f"{path}: its run folder {folder} holds no run yet"])
        return Path(folder)
    if not path.is_dir():
        raise ConfigError([f"{path}: does not exist; name a run folder, or the file of a run"])
    if is_run(path):
        return path
    inside = find_runs([path]).folders
    if inside:
        raise ConfigError(
            [f"{path}: is no run folder, but holds {len(inside)}, the first is {inside[0]}"]
        )
    raise ConfigError([f"{path}: is no run folder (it holds neither launch/ nor config.toml)"])
