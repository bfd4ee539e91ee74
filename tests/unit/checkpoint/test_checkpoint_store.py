import errno
import importlib.metadata
import logging
import os
import shutil

import pytest
import torch

from mpotrain.checkpoint.manifest import fingerprint, signatures
from mpotrain.checkpoint.reader import open_checkpoint
from mpotrain.checkpoint.share import ShareReport, merge_reports
from mpotrain.errors import CheckpointError, StorageError


def assert_holds(reader, items):
    assert list(reader.manifest.tensors) == [item.name for item in items]
    for item in items:
        loaded = reader.read(item.name)
        assert loaded.keys() == item.tensors.keys()
        for kind, tensor in item.tensors.items():
            assert torch.equal(loaded[kind], tensor), (item.name, kind)


def names(store):
    return sorted(path.name for path in store.folder.iterdir() if not path.name.startswith("."))


def test_saved_state_comes_back_exactly(make_store, exported, run_state):
    store = make_store()
    path = store.save(run_state(10), exported(10))
    assert path == store.folder / "step-00000010"
    assert (store.folder / "latest").read_text() == "step-00000010\n"
    again = make_store()
    manifest = again.latest()
    assert manifest.run.consumed_samples == 80
    assert manifest.run.num_updates == 9
    assert manifest.run.rng.rule == "splitmix64"
    assert manifest.versions["torch"] == importlib.metadata.version("torch")
    assert manifest.tensors["block.0.core.1"].role == "central"
    assert manifest.fingerprint == fingerprint(signatures(manifest))
    assert_holds(again.open(manifest.step), exported(10))


def test_nothing_saved_yet(make_store):
    store = make_store()
    assert store.latest() is None
    assert store.steps() == []
    assert not store.folder.exists()


def test_parts_are_bounded_and_all_are_read(make_store, exported, run_state):
    store = make_store(part_bytes=1)
    store.save(run_state(10), exported(10))
    manifest = make_store().latest()
    assert len(manifest.files) == len(exported(10))
    assert_holds(store.open(10), exported(10))


def test_save_takes_one_part_at_a_time(make_store, item, run_state):
    """Memory is bounded: a tensor is released when its part has been written."""
    import weakref

    alive = []
    most = 0

    def stream():
        nonlocal most
        for index in range(12):
            tensor = torch.full((256,), float(index))
            alive.append(weakref.ref(tensor))
            yield item(f"w{index}", "dense", {"weight": tensor})
            del tensor
            most = max(most, sum(ref() is not None for ref in alive))

    make_store(part_bytes=2048).save(run_state(1), stream())
    assert most <= 3


def test_only_the_wanted_kinds_are_read(make_store, exported, run_state):
    store = make_store()
    store.save(run_state(10), exported(10))
    reader = store.open(10)
    assert list(reader.read("norm.scale", ("weight",))) == ["weight"]
    with pytest.raises(CheckpointError, match=r"norm\.scale was stored without momentum"):
        reader.read("norm.scale", ("momentum",))
    with pytest.raises(CheckpointError, match=r"no parameter 'norm\.scal'.*norm\.scale"):
        reader.read("norm.scal")


def test_retention_keeps_the_newest_and_the_permanent(make_store, exported, run_state):
    store = make_store(keep_last=2, keep_every=20)
    for step in (10, 20, 30, 40, 50):
        store.save(run_state(step), exported(step))
    assert store.steps() == [50, 40, 20]
    assert names(store) == ["latest", "step-00000020", "step-00000040", "step-00000050"]


def test_retention_after_going_back_keeps_what_was_just_saved(make_store, exported, run_state):
    store = make_store(keep_last=1)
    for step in (10, 20):
        store.save(run_state(step), exported(step))
    store.save(run_state(6), exported(6))
    assert 6 in store.steps()


def test_retention_does_not_trust_damaged_ones(make_store, exported, run_state):
    store = make_store(keep_last=3)
    for step in (10, 20, 30):
        store.save(run_state(step), exported(step))
    for step in (20, 30):
        (store.folder / f"step-{step:08d}" / "manifest.json").unlink()
    again = make_store(keep_last=1)
    assert again.retain() == []
    assert again.latest().step == 10


def test_failed_deletion_does_not_fail_the_save(
    make_store, exported, run_state, monkeypatch, caplog
):
    def refuses(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    store = make_store(keep_last=1)
    store.save(run_state(10), exported(10))
    monkeypatch.setattr(shutil, "rmtree", refuses)
    with caplog.at_level(logging.WARNING):
        store.save(run_state(20), exported(20))
    assert "could not be deleted" in caplog.text
    assert store.steps() == [20]
    monkeypatch.undo()
    store.save(run_state(30), exported(30))
    assert names(store) == ["latest", "step-00000030"]


def test_same_step_is_replaced_as_a_whole(make_store, exported, run_state):
    store = make_store(part_bytes=1)
    store.save(run_state(10), exported(10))
    store.latest()
    store.save(run_state(10, consumed_samples=5), exported(11)[:3])
    assert names(store) == ["latest", "step-00000010"]
    assert store.latest().run.consumed_samples == 5
    assert_holds(store.open(10), exported(11)[:3])
    assert_holds(make_store().open(10), exported(11)[:3])


def test_damaged_checkpoint_is_skipped_and_reported(make_store, exported, run_state, caplog):
    store = make_store()
    for step in (10, 20):
        store.save(run_state(step), exported(step))
    part = store.folder / "step-00000020" / "rank-00000-part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    again = make_store()
    assert again.latest().step == 10
    assert "content has changed" in again.rejected[20][0]
    assert "step 20 skipped" in caplog.text
    with pytest.raises(CheckpointError, match=r"step 20 cannot be used:\n.*content has changed"):
        again.open(20)
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        open_checkpoint(part.parent)
    assert make_store(verify=False).latest().step == 20


def test_all_damaged_is_an_error_not_a_new_start(make_store, exported, run_state):
    store = make_store()
    for step in (10, 20):
        store.save(run_state(step), exported(step))
        os.truncate(store.folder / f"step-{step:08d}" / "manifest.json", 100)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be used.*step 20:.*step 10:"):
        make_store().latest()


def test_renamed_folder_is_refused(make_store, exported, run_state):
    store = make_store()
    store.save(run_state(10), exported(10))
    (store.folder / "step-00000010").rename(store.folder / "step-00000050")
    with pytest.raises(CheckpointError, match=r"manifest is that of step 10"):
        make_store().open(50)


def test_fifo_in_place_of_a_file_does_not_hang(make_store, exported, run_state):
    store = make_store()
    store.save(run_state(10), exported(10))
    part = store.folder / "step-00000010" / "rank-00000-part-00000.safetensors"
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(CheckpointError, match="not a regular file"):
        make_store().open(10)


def test_unknown_step_lists_the_known_ones(make_store, exported, run_state):
    store = make_store()
    store.save(run_state(10), exported(10))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 11; there are: 10"):
        store.open(11)


def test_copied_folder_opens_anywhere(make_store, exported, run_state, tmp_path):
    store = make_store()
    copy = shutil.copytree(store.save(run_state(10), exported(10)), tmp_path / "given to a friend")
    assert_holds(open_checkpoint(copy), exported(10))


BAD_EXPORTS = {
    "exported twice": lambda item: [
        item("w", "dense", {"weight": torch.zeros(2)}),
        item("w", "dense", {"weight": torch.zeros(2)}),
    ],
    "without its weight": lambda item: [item("w", "dense", {"exp_avg": torch.zeros(2)})],
    "differ in shape": lambda item: [
        item("w", "dense", {"weight": torch.zeros(2), "exp_avg": torch.zeros(3)})
    ],
    "no rank wrote w": lambda item: [item("w", "dense", None)],
    "not a tensor that can be stored": lambda item: [
        item("w", "dense", {"weight": torch.zeros(2, dtype=torch.complex64)})
    ],
}


@pytest.mark.parametrize("message", BAD_EXPORTS)
def test_bad_export_is_refused_and_leaves_nothing(make_store, run_state, exported, item, message):
    store = make_store()
    store.save(run_state(10), exported(10))
    with pytest.raises(CheckpointError, match=message):
        store.save(run_state(20), BAD_EXPORTS[message](item))
    assert names(store) == ["latest", "step-00000010"]


def test_state_that_json_cannot_hold_leaves_nothing(make_store, run_state, exported):
    store = make_store()
    store.save(run_state(10), exported(10))
    with pytest.raises(CheckpointError, match=r"run\.train_state\.loss"):
        store.save(run_state(20, train_state={"loss": float("nan")}), exported(20))
    assert names(store) == ["latest", "step-00000010"]


def test_parameter_of_two_ranks_is_refused(make_store, exported, run_state):
    store = make_store()
    store.save(run_state(10), exported(10))
    tensors = dict(store.latest().tensors)
    reports = [ShareReport(0, tensors=tensors), ShareReport(1, tensors=tensors)]
    with pytest.raises(CheckpointError, match=r"embedding\.weight: written by ranks 0 and 1"):
        merge_reports(reports, list(tensors))


@pytest.mark.parametrize("call", range(9))
def test_failing_write_leaves_the_earlier_checkpoint(
    make_store, exported, run_state, monkeypatch, call
):
    """Every fsync of a save fails once: parts, draft, manifest, draft, parent, pointer, parent."""
    store = make_store(part_bytes=400)
    store.save(run_state(10), exported(10))
    real, seen = os.fsync, []

    def fails(handle):
        seen.append(handle)
        if len(seen) == call + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StorageError, match=r"Input/output error.*bytes are free"):
        store.save(run_state(20), exported(20))
    monkeypatch.undo()
    again = make_store()
    assert again.latest().step in (10, 20)
    assert_holds(again.open(10), exported(10))
    assert not [name for name in names(store) if ".tmp-" in name]
    store.save(run_state(30), exported(30))
    assert store.latest().step == 30


def test_everything_is_durable_before_it_is_named(make_store, exported, run_state, monkeypatch):
    """The order of fsync and rename is what survives a power failure."""
    store = make_store(part_bytes=400)
    store.save(run_state(10), exported(10))
    path_type, log = type(store.folder), []
    real_sync, real_rename, real_replace = os.fsync, path_type.rename, path_type.replace

    def short(path):
        name, mark, _ = path.name.partition(".tmp-")
        return f"{name}{mark}*" if mark else name

    def sync(handle):
        log.append(f"sync {short(path_type(f'/proc/self/fd/{handle}').readlink())}")
        real_sync(handle)

    def rename(self, target):
        log.append(f"rename {short(self)}")
        return real_rename(self, target)

    def replace(self, target):
        log.append(f"replace {target.name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(path_type, "rename", rename)
    monkeypatch.setattr(path_type, "replace", replace)
    store.save(run_state(20), exported(20))
    assert log == [
        "sync rank-00000-part-00000.safetensors",
        "sync rank-00000-part-00001.safetensors",
        "sync rank-00000-part-00002.safetensors",
        "sync step-00000020.tmp-*",
        "sync manifest.json",
        "sync step-00000020.tmp-*",
        "rename step-00000020.tmp-*",
        "sync checkpoints",
        "sync latest.tmp-*",
        "replace latest",
        "sync checkpoints",
    ]


def test_failing_replacement_brings_the_old_one_back(make_store, exported, run_state, monkeypatch):
    store = make_store()
    store.save(run_state(10), exported(10))
    path_type = type(store.folder)
    real = path_type.rename

    def fails(self, target):
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(path_type, "rename", fails)
    with pytest.raises(StorageError):
        store.save(run_state(10), exported(11))
    monkeypatch.undo()
    assert names(store) == ["latest", "step-00000010"]
    assert_holds(make_store().open(10), exported(10))


def test_folder_that_cannot_be_made_is_a_storage_error(make_store, exported, run_state, tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(StorageError, match="File exists"):
        make_store().save(run_state(10), exported(10))
