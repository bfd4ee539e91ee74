import logging
import multiprocessing
import os
import shutil

import pytest

from mpotrain.checkpoint import folders
from mpotrain.checkpoint.folders import (
    POINTER_NAME,
    discard,
    published,
    recover,
    step_name,
    write_pointer,
)
from mpotrain.checkpoint.lock import FolderLock
from mpotrain.errors import CheckpointError


def make(folder, *names):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "content").write_text(name)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_final_names_count_newest_first(tmp_path):
    make(
        tmp_path,
        "step-00000010",
        "step-00000200",
        "step-123456789",
        "step-00000300.tmp-0123abcd",
        "step-400",
        "step-0000000500",
        "best",
    )
    (tmp_path / "step-00000600").write_text("a file, not a folder")
    assert list(published(tmp_path)) == [123456789, 200, 10]
    assert published(tmp_path)[10].name == step_name(10)
    assert published(tmp_path / "missing") == {}


def test_checkpoint_set_aside_counts_until_its_successor_is_there(tmp_path):
    make(tmp_path, "step-00000010.old-0123abcd")
    assert published(tmp_path)[10].name == "step-00000010.old-0123abcd"
    make(tmp_path, "step-00000010")
    assert published(tmp_path)[10].name == "step-00000010"


def test_recover_restores_and_removes_only_ours(tmp_path):
    mine = ["step-00000030.tmp-0123abcd", "step-00000020.old-0123abcd"]
    others = ["step-00000040.tmp-mine", "notes.tmp-0123abcd", "step-00000010"]
    make(tmp_path, *mine, *others, "step-00000010.old-00000000")
    (tmp_path / "latest.tmp-0123abcd").write_text("half")
    touched = recover(tmp_path)
    assert sorted(touched) == sorted([*mine, "step-00000010.old-00000000", "latest.tmp-0123abcd"])
    assert names(tmp_path) == sorted([*others, "step-00000020"])
    assert (tmp_path / "step-00000020" / "content").read_text() == "step-00000020.old-0123abcd"
    assert (tmp_path / "step-00000010" / "content").read_text() == "step-00000010"


def test_half_deleted_checkpoint_does_not_count(tmp_path, monkeypatch):
    make(tmp_path, "step-00000010")

    def dies(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        discard(tmp_path / "step-00000010")
    monkeypatch.undo()
    assert published(tmp_path) == {}
    recover(tmp_path)
    assert names(tmp_path) == []


def test_deleting_a_link_leaves_its_target(tmp_path):
    make(tmp_path, "elsewhere")
    (tmp_path / "step-00000010").symlink_to(tmp_path / "elsewhere")
    assert list(published(tmp_path)) == [10]
    assert discard(tmp_path / "step-00000010")
    assert names(tmp_path) == ["elsewhere"]
    assert (tmp_path / "elsewhere" / "content").exists()


def test_failed_rename_is_logged_and_nothing_is_lost(tmp_path, monkeypatch, caplog):
    make(tmp_path, "step-00000010")

    def refuses(path, target):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "rename", refuses)
    with caplog.at_level(logging.WARNING, logger=folders.__name__):
        assert not discard(tmp_path / "step-00000010")
    assert "could not be deleted" in caplog.text
    assert (tmp_path / "step-00000010" / "content").exists()


def test_pointer_is_replaced_whole(tmp_path):
    write_pointer(tmp_path, 10)
    write_pointer(tmp_path, 20)
    assert (tmp_path / POINTER_NAME).read_text() == "step-00000020\n"
    assert names(tmp_path) == [POINTER_NAME]


def try_lock(folder, results):
    lock = FolderLock(folder)
    try:
        lock.acquire()
        results.put("got it")
    except CheckpointError as error:
        results.put(str(error))


def test_second_process_is_refused_until_the_first_lets_go(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()

    def attempt():
        process = context.Process(target=try_lock, args=(tmp_path, results))
        process.start()
        answer = results.get(timeout=300)
        process.join(300)
        return answer

    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.acquire()
    refusal = attempt()
    assert "another live process" in refusal
    assert f"process {os.getpid()} on " in refusal
    lock.release()
    assert attempt() == "got it"
