"""Corrupt and attack: damage is found before any tensor is read, and nothing is executed."""

import dataclasses
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from checkpoint_process import (
    choose_step,
    files_of,
    open_store,
    run_ranks_once,
    train,
    train_ranks,
)
from torch.distributed.checkpoint import FileSystemReader

from mpotrain.checkpoint.manifest import FileEntry, Manifest
from mpotrain.checkpoint.manifest_file import encode_manifest, read_manifest
from mpotrain.checkpoint.reader import open_checkpoint
from mpotrain.checkpoint.verify import digest_file
from mpotrain.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def two_steps(folder):
    train(folder, 2)
    return folder


def rejection(folder, verify=True):
    """Return why step 2 is refused; the run goes on from step 1."""
    store = open_store(folder, verify=verify)
    manifest = store.latest()
    assert manifest.step == 1
    return store.rejected[2][0]


def test_every_flipped_bit_is_found(two_steps):
    files = files_of(two_steps / "step-00000002")
    sizes = [file.stat().st_size for file in files]
    rng = random.Random(3)
    for trial in range(64):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        broken = bytearray(whole)
        position = rng.randrange(sizes[trial % len(files)])
        broken[position] ^= 1 << rng.randrange(8)
        file.write_bytes(broken)
        assert file.name in rejection(two_steps), position
        file.write_bytes(whole)
    assert open_store(two_steps).latest().step == 2


def test_every_truncation_and_every_missing_file_is_found(two_steps):
    rng = random.Random(4)
    for file in files_of(two_steps / "step-00000002"):
        whole = file.read_bytes()
        for size in (0, len(whole) - 1, rng.randrange(len(whole)), rng.randrange(len(whole))):
            file.write_bytes(whole[:size])
            assert file.name in rejection(two_steps)
            assert file.name in rejection(two_steps, verify=False)
        file.unlink()
        assert file.name in rejection(two_steps)
        assert file.name in rejection(two_steps, verify=False)
        file.write_bytes(whole)
    assert open_store(two_steps).latest().step == 2


def test_swapped_files_are_found_and_all_ranks_agree(folder, tmp_path):
    run_ranks_once(2, tmp_path / "meet", train_ranks, folder, 2)
    step = folder / "step-00000002"
    first, second = (step / f"rank-{rank:05d}-part-00000.safetensors" for rank in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    first.rename(step / "aside")
    second.rename(first)
    (step / "aside").rename(second)
    answers = run_ranks_once(2, tmp_path / "again", choose_step, folder)
    assert answers == [(1, [2]), (1, [2])]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def attacks(marker):
    import io

    box = io.BytesIO()
    torch.save({"x": Payload(marker)}, box)
    return {"pickle": pickle.dumps(Payload(marker)), "torch.save": box.getvalue()}


@pytest.mark.parametrize("format_name", ["pickle", "torch.save"])
def test_planted_pickles_are_never_executed(two_steps, tmp_path, format_name):
    marker = tmp_path / "executed"
    attack = attacks(marker)[format_name]
    step = two_steps / "step-00000002"
    places = [*files_of(step), step / ".metadata", step / "__0_0.distcp", two_steps / "latest"]
    for place in places:
        whole = place.read_bytes() if place.exists() else None
        place.write_bytes(attack)
        for verify in (True, False):
            store = open_store(two_steps, verify=verify)
            try:
                reader = store.open(store.latest().step)
                for name in reader.manifest.tensors:
                    reader.read(name)
            except CheckpointError:
                pass
        assert not marker.exists(), place
        if whole is None:
            place.unlink()
        else:
            place.write_bytes(whole)
    assert open_store(two_steps).latest().step == 2


@pytest.mark.parametrize("format_name", ["pickle", "torch.save"])
def test_hostile_checkpoint_with_right_digests_is_only_numbers(two_steps, tmp_path, format_name):
    """Whoever makes the files makes the digests too: reading must be harmless in itself."""
    marker = tmp_path / "executed"
    step = two_steps / "step-00000002"
    manifest = read_manifest(step)
    attack = attacks(marker)[format_name]
    files = {}
    for name, entry in manifest.files.items():
        (step / name).write_bytes(attack.ljust(entry.bytes, b"\0"))
        files[name] = FileEntry(bytes=(step / name).stat().st_size, digest=digest_file(step / name))
    hostile: Manifest = dataclasses.replace(manifest, files=files)
    (step / "manifest.json").write_bytes(encode_manifest(hostile))
    (step / ".metadata").write_bytes(attack)
    reader = open_checkpoint(step)
    for name in manifest.tensors:
        reader.read(name)
    assert not marker.exists()


def test_the_payload_works_where_pickles_are_loaded(tmp_path):
    """Control: torch's own file storage executes it, so the tests above can fail."""
    (tmp_path / ".metadata").write_bytes(attacks(tmp_path / "executed")["pickle"])
    with pytest.raises(AttributeError):
        FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "executed").exists()


def test_link_to_a_file_elsewhere_is_refused(two_steps, tmp_path):
    part = files_of(two_steps / "step-00000002")[-1]
    shutil.move(part, tmp_path / "secret")
    part.symlink_to(tmp_path / "secret")
    assert "not a regular file" in rejection(two_steps)


def test_signed_manifest_cannot_reach_other_files(two_steps, tmp_path):
    step = two_steps / "step-00000002"
    data = json.loads((step / "manifest.json").read_text())
    name = next(iter(data["files"]))
    data["files"]["../../secret"] = data["files"].pop(name)
    del data["digest"]
    body = json.dumps(data, indent=1).encode().removesuffix(b"\n}")
    tail = f',\n "digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()
    (step / "manifest.json").write_bytes(body + tail)
    (tmp_path / "secret").write_bytes(b"")
    assert "not a plain file name" in rejection(two_steps)
