"""What a run says of its code: commit, changed files, and a patch that brings them back."""

import subprocess
from pathlib import Path

import pytest

from mpotrain.provenance import git_diff, git_state


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "a $(touch pwned) tree"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "text").write_text("one\n")
    (folder / "bytes").write_bytes(bytes(range(256)))
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_clean_tree(tree: Path) -> None:
    commit = git(tree, "rev-parse", "HEAD").strip()
    assert git_state(tree) == {"commit": commit, "changed": []}
    assert git_diff(tree) == b""


def test_diff_brings_changes_back(tree: Path, tmp_path: Path) -> None:
    (tree / "text").write_text("two\n")
    (tree / "bytes").write_bytes(bytes(reversed(range(256))))
    state = git_state(tree)
    assert state is not None
    assert state["changed"] == ["M bytes", "M text"]
    patch = tmp_path / "git.diff"
    patch.write_bytes(git_diff(tree))
    git(tree, "checkout", "--", ".")
    assert (tree / "text").read_text() == "one\n"
    git(tree, "apply", str(patch))
    assert (tree / "text").read_text() == "two\n"
    assert (tree / "bytes").read_bytes() == bytes(reversed(range(256)))


def test_outside_of_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    assert git_diff(tmp_path) == b""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert git_state(tmp_path) is None
