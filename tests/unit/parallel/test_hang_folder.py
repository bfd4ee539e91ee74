"""Files of a hang: one name for all ranks of a start, nothing of an earlier start."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mpotrain.parallel.hang_folder import Hang, HangFolder, Pulse


def rank_of(folder: Path, rank: int, life: str | None = "now") -> HangFolder:
    files = HangFolder(folder, rank)
    files.life = life
    return files


def test_all_ranks_get_the_folder_of_the_first(tmp_path: Path) -> None:
    first, second = rank_of(tmp_path, 3), rank_of(tmp_path, 0)
    assert second.named() is None
    folder = first.name(5)
    assert second.named() == folder
    assert second.name(6) == folder
    assert [path.name for path in (tmp_path / "hangs").iterdir() if path.is_dir()] == [folder.name]
    assert folder.name.endswith("-step5")


def test_another_start_has_another_folder(tmp_path: Path) -> None:
    rank_of(tmp_path, 0, "before").name(5)
    later = rank_of(tmp_path, 0)
    assert later.named() is None
    assert later.name(9).name.endswith("-step9")


def test_ranks_that_never_met_hear_nothing(tmp_path: Path) -> None:
    rank_of(tmp_path, 0).name(5)
    alone = rank_of(tmp_path, 1, None)
    assert alone.named() is None
    assert alone.name(0).name.endswith("-step0")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rank": 1}', '{"folder": "../../etc"}'])
def test_a_damaged_marker_leads_nowhere_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "hangs").mkdir()
    (tmp_path / "hangs" / "life-now.json").write_text(content)
    named = rank_of(tmp_path, 0).named()
    assert named is None or named.parent == tmp_path / "hangs"


def test_without_hard_links_the_marker_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    folder = rank_of(tmp_path, 1).name(4)
    assert rank_of(tmp_path, 0).named() == folder
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_what_a_rank_writes(tmp_path: Path) -> None:
    files = rank_of(tmp_path, 2)
    folder = files.name(1)
    assert files.answered(folder) == ()
    files.write(folder, ["line of facts"])
    assert files.answered(folder) == (2,)
    text = (folder / "rank-2.txt").read_text()
    assert text.startswith("line of facts\n")
    assert "test_what_a_rank_writes" in text
    assert json.loads((folder / "rank-2.trace.json").read_text())["rank"] == 2


def test_one_rank_alone_writes_the_summary(tmp_path: Path) -> None:
    folder = rank_of(tmp_path, 0).name(1)
    assert rank_of(tmp_path, 0).summarize(folder, "first")
    assert not rank_of(tmp_path, 1).summarize(folder, "second")
    assert (folder / "summary.txt").read_text() == "first\n"


def test_old_hangs_are_deleted_with_their_markers(tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    for day in range(10, 23):
        folder = hangs / f"202601{day}-000000-step{day}"
        folder.mkdir(parents=True)
        (folder / "rank-0.txt").touch()
        (hangs / f"life-{day}.json").write_text(json.dumps({"folder": folder.name}))
    rank_of(tmp_path, 0).forget_old()
    assert sorted(path.name[:8] for path in hangs.iterdir() if path.is_dir()) == [
        f"202601{day}" for day in range(13, 23)
    ]
    assert {path.name for path in hangs.glob("life-*")} == {
        f"life-{day}.json" for day in range(13, 23)
    }
    # A rank of an earlier start that comes back must find where the others are.
    assert rank_of(tmp_path, 0, "22").named() == hangs / "20260122-000000-step22"


def test_without_hangs_nothing_is_deleted_or_made(tmp_path: Path) -> None:
    rank_of(tmp_path, 0).forget_old()
    assert list(tmp_path.iterdir()) == []
    folder = rank_of(tmp_path, 0).name(5)
    rank_of(tmp_path, 0).forget_old()
    assert folder.is_dir()


def test_the_description_names_who_is_silent(tmp_path: Path) -> None:
    hang = Hang(tmp_path, 12, "evaluating", 90.0, (0, 2), 4)
    text = hang.describe()
    assert text.startswith("no progress for 1.5 minutes after step 12 (evaluating)")
    assert text.endswith("no answer from 2 of 4 ranks: 1, 3")
    assert Hang(tmp_path, 0, "x", 1.0, (), 100).describe().endswith("0, 1, 2, 3, 4, 5, 6, 7, ...")


def test_a_pulse_is_that_of_others(tmp_path: Path) -> None:
    one, other = Pulse(tmp_path / "pulse"), Pulse(tmp_path / "pulse")
    assert not one.moved()
    one.touch()
    assert not one.moved()
    assert other.moved()
    assert not other.moved()
    os.utime(tmp_path / "pulse", ns=(1, 1))  # whatever clock the other rank has
    assert one.moved()


def test_without_a_run_folder_there_is_no_pulse(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "none" / "pulse")
    pulse.touch()
    assert not pulse.moved()
    assert not (tmp_path / "none").exists()
