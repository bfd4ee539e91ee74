"""torch.distributed.checkpoint over safetensors files and a JSON manifest: nothing is pickled.

torch's own file storage keeps its `.metadata` as a pickle and executes it on load. Here the data
files are plain safetensors (a JSON header and raw numbers), and what torch calls metadata is made
from the manifest, so that loading a foreign checkpoint cannot run code. torch's planners still do
the planning: whole tensors, slices and DTensor shards can be asked for on load.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from mpotrain.checkpoint.folders import new_file
from mpotrain.checkpoint.manifest import DTYPE_BYTES, FileEntry, Manifest, Placement
from mpotrain.errors import CheckpointError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types by their safetensors names."""
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""safetensors names by element type."""


def full_name(kind: str, name: str) -> str:
    """Return the key of one tensor in torch.distributed.checkpoint, e.g. `exp_avg.wte.weight`."""
    return f"{kind}.{name}"


class PartWriter(StorageWriter):
    """Writes the tensors of one `torch.distributed.checkpoint.save` into one safetensors file.

    Attributes:
        path: the file; it must not exist.
        placements: where each tensor lies, by full name; filled by the save.
        entry: size and digest of the file; filled by the save.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.placements: dict[str, Placement] = {}
        self.entry: FileEntry | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: every process writes its own files."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write header and tensors, digest them on the way and make the file durable."""
        tensors = []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{item.index.fqn}: not a tensor that can be stored")
            tensors.append((item.index, tensor.detach()))
        header = self._layout([(index.fqn, tensor) for index, tensor in tensors])
        hasher = xxhash.xxh3_128(header)
        with new_file(self.path) as file:
            file.write(header)
            for _, tensor in tensors:
                data = _bytes_of(tensor)
                hasher.update(data)
                file.write(data)
            size = file.tell()
        self.entry = FileEntry(bytes=size, digest=hasher.hexdigest())
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(index, self.placements[index.fqn].bytes, self.placements[index.fqn])
                for index, _ in tensors
            ]
        )
        return done

    def _layout(self, tensors: list[tuple[str, Tensor]]) -> bytes:
        """Place the tensors one after the other and return the safetensors header."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, tensor in tensors:
            dtype = DTYPE_NAMES[tensor.dtype]
            end = start + tensor.numel() * DTYPE_BYTES[dtype]
            table[name] = {
                "dtype": dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name, _ in tensors:
            begin, end = table[name]["data_offsets"]
            self.placements[name] = Placement(
                file=self.path.name,
                offset=8 + len(text) + begin,
                bytes=end - begin,
                dtype=table[name]["dtype"],
            )
        return len(text).to_bytes(8, "little") + text

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the manifest takes the place of torch's metadata file."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Refuse to be chosen by path: a manifest has to come with the data."""
        return False


class ManifestReader(StorageReader):
    """Reads tensors for `torch.distributed.checkpoint.load` as a manifest describes them.

    Attributes:
        folder: folder of the checkpoint.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._places: dict[str, Placement] = {}
        self._metadata = self._describe()

    def _describe(self) -> Metadata:
        described: dict[str, Any] = {}
        for name, entry in self.manifest.tensors.items():
            size = torch.Size(entry.shape)
            chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
            for kind, place in entry.kinds.items():
                key = full_name(kind, name)
                properties = TensorProperties(dtype=TORCH_DTYPES[place.dtype])
                described[key] = TensorStorageMetadata(properties, size, [chunk])
                self._places[key] = place
        return Metadata(described)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader belongs to one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the manifest says, in torch's terms."""
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the manifest has said everything."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every tensor of the plan and copy the wanted part of it to its destination."""
        for item in plan.items:
            tensor = self._read(item.storage_index)
            for dim, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                tensor = tensor.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, index: MetadataIndex) -> Tensor:
        place = self._places[index.fqn]
        described = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(described, TensorStorageMetadata)
        tensor = torch.empty(prod(described.size), dtype=described.properties.dtype)
        if place.bytes:
            data = tensor.view(torch.uint8).numpy().data
            with (self.folder / place.file).open("rb") as file:
                file.seek(place.offset)
                count = file.readinto(data)
            if count != place.bytes:
                raise CheckpointError(
                    f"{self.folder / place.file}: {index.fqn} is cut off after {count} of "
                    f"{place.bytes} bytes"
                )
        return tensor.view(described.size)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Refuse to be chosen by path: see `mpotrain.checkpoint.reader`."""
        return False


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the elements as bytes in C order, without a copy where the layout allows it."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
