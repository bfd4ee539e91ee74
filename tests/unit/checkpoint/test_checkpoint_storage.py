"""torch.distributed.checkpoint over safetensors files and a manifest."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from mpotrain.checkpoint.dcp import load_tensors, save_tensors
from mpotrain.checkpoint.manifest import FileEntry, Manifest, TensorEntry, fingerprint
from mpotrain.checkpoint.manifest_file import FORMAT
from mpotrain.checkpoint.storage import TORCH_DTYPES, ManifestReader, PartWriter
from mpotrain.checkpoint.verify import digest_file
from mpotrain.errors import CheckpointError


def some_tensors():
    values = {
        name: torch.arange(12).reshape(3, 4).to(dtype) for name, dtype in TORCH_DTYPES.items()
    }
    values["scalar"] = torch.tensor(2.5)
    values["empty"] = torch.zeros(0, 3)
    values["transposed"] = torch.arange(6.0).reshape(2, 3).T
    values["part"] = torch.arange(20.0)[5:9]
    values["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    return {f"weight.{name}": value for name, value in values.items()}


def written(folder, tensors):
    writer = PartWriter(folder / "part.safetensors")
    save_tensors(tensors, writer)
    return writer


def described(writer, tensors, run_state):
    entries = {
        key.partition(".")[2]: TensorEntry(
            role="dense", shape=tuple(tensor.shape), kinds={"weight": writer.placements[key]}
        )
        for key, tensor in tensors.items()
    }
    return Manifest(
        format=FORMAT,
        run=run_state(1),
        versions={},
        fingerprint=fingerprint({name: (e.role, e.shape) for name, e in entries.items()}),
        tensors=entries,
        files={writer.path.name: writer.entry},
    )


def test_file_is_readable_by_the_safetensors_library(tmp_path):
    tensors = some_tensors()
    written(tmp_path, tensors)
    loaded = load_file(tmp_path / "part.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key].nan_to_num(7.0), tensor.nan_to_num(7.0)), key


def test_digest_and_size_are_those_of_the_file(tmp_path):
    writer = written(tmp_path, some_tensors())
    size = writer.path.stat().st_size
    assert writer.entry == FileEntry(bytes=size, digest=digest_file(writer.path))


def test_round_trip_is_exact(tmp_path, run_state):
    tensors = some_tensors()
    manifest = described(written(tmp_path, tensors), tensors, run_state)
    assert manifest.problems() == []
    loaded = {key: torch.empty(tensor.shape).to(tensor.dtype) for key, tensor in tensors.items()}
    load_tensors(loaded, ManifestReader(tmp_path, manifest))
    for key, tensor in tensors.items():
        bits = [value.contiguous().reshape(-1).view(torch.uint8) for value in (loaded[key], tensor)]
        assert torch.equal(*bits), key


def test_dtensor_receives_its_shard(tmp_path, run_state):
    """torch's planner reshards on load: rank 1 of 2 asks for its rows only."""
    tensors = {"weight.w": torch.arange(24.0).reshape(6, 4)}
    manifest = described(written(tmp_path, tensors), tensors, run_state)
    reader = ManifestReader(tmp_path, manifest)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=store)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        shard = torch.distributed.tensor.DTensor.from_local(
            torch.zeros(3, 4), mesh, [torch.distributed.tensor.Shard(0)], run_check=False
        )
        load_tensors({"weight.w": shard}, reader)
        assert torch.equal(shard.to_local(), tensors["weight.w"][3:])
    finally:
        torch.distributed.destroy_process_group()


def test_errors_of_the_file_system_arrive_as_they_are(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        written(tmp_path, some_tensors())
    assert caught.value.errno == errno.ENOSPC
    assert not isinstance(caught.value, CheckpointException)


def test_interrupt_stays_an_interrupt(tmp_path, monkeypatch):
    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, some_tensors())


def test_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / "part.safetensors").write_text("precious")
    with pytest.raises(FileExistsError):
        written(tmp_path, some_tensors())
    assert (tmp_path / "part.safetensors").read_text() == "precious"


def test_cut_off_file_is_noticed_while_reading(tmp_path, run_state):
    tensors = {"weight.w": torch.arange(24.0)}
    writer = written(tmp_path, tensors)
    manifest = described(writer, tensors, run_state)
    os.truncate(writer.path, writer.entry.bytes - 4)
    with pytest.raises(CheckpointError, match=r"weight\.w is cut off after 92 of 96 bytes"):
        load_tensors({"weight.w": torch.empty(24)}, ManifestReader(tmp_path, manifest))


def test_type_that_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"weight\.c"):
        written(tmp_path, {"weight.c": torch.zeros(2, dtype=torch.complex64)})
