"""Where the code of a run comes from: the state of the git work tree it lies in (no torch)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 10
"""How long git may take; a work tree on a slow file system must not hold a start up."""


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and whether files differ from it; None outside of a git work tree.

    Args:
        folder: a folder of the work tree.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {
        "commit": commit.decode(errors="replace").strip(),
        "changed": [line.strip() for line in changed.decode(errors="replace").splitlines()],
    }


def git_diff(folder: Path) -> bytes:
    """Return in what tracked files differ from the commit, as a patch that `git apply` takes.

    Args:
        folder: a folder of the work tree.

    Returns:
        The patch; empty where nothing differs, and outside of a work tree.
    """
    try:
        return _git(folder, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff")
    except (OSError, subprocess.SubprocessError):
        return b""


def _git(folder: Path, *arguments: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=TIMEOUT_SECONDS,
    ).stdout  # fmt: skip
