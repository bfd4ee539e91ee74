"""What one process writes of a checkpoint, and its report about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mpotrain.checkpoint.dcp import save_tensors
from mpotrain.checkpoint.folders import storage_problem
from mpotrain.checkpoint.manifest import WEIGHT, FileEntry, Placement, TensorEntry
from mpotrain.checkpoint.storage import PartWriter, full_name
from mpotrain.durable import fsync_folder
from mpotrain.errors import CheckpointError


class StateTensorLike(Protocol):
    """A parameter as an engine exports it.

    The tensors must stay as they are until the next part has been written: an engine must not
    yield one buffer again and again.
    """

    @property
    def name(self) -> str:
        """Logical name."""

    @property
    def role(self) -> str:
        """Value of `mpotrain.nn.roles.Role`."""

    @property
    def tensors(self) -> Mapping[str, Tensor] | None:
        """Tensors by kind on the rank that owns the parameter, None on the others."""


@dataclass
class ShareReport:
    """What a process has written, or why it could not.

    Attributes:
        rank: the process.
        tensors: parameters it wrote, with their places.
        files: files it wrote.
        num_bytes: bytes of all tensors that it owns, written or not.
        failure: what went wrong, None when nothing did.
        is_storage: whether the failure came from the file system.
    """

    rank: int
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    num_bytes: int = 0
    failure: str | None = None
    is_storage: bool = False


class ShareWriter:
    """Collects the parameters that this process owns and writes them in parts.

    A part is one safetensors file; not more than a part is held in memory. After a failure it
    still takes tensors, but only counts them: the export of an engine is collective, and a
    process that stopped would leave the others waiting.

    Attributes:
        report: what was written so far.
        names: names of all parameters seen, also of those that others own.
        error: the exception behind a failure.
    """

    def __init__(
        self, folder: Path, rank: int, part_bytes: int, on_point: Callable[[str], None]
    ) -> None:
        self.report = ShareReport(rank)
        self.names: list[str] = []
        self.error: Exception | None = None
        self._folder = folder
        self._part_bytes = part_bytes
        self._on_point = on_point
        self._pending: dict[str, Mapping[str, Tensor]] = {}
        self._roles: dict[str, str] = {}
        self._pending_bytes = 0

    def write(self, tensors: Iterable[StateTensorLike]) -> None:
        """Take all parameters of the model and write those that this process owns.

        Args:
            tensors: every parameter once, in the same order on every process.
        """
        for item in tensors:
            self.names.append(item.name)
            if item.tensors is not None:
                self._take(item.name, str(item.role), item.tensors)
        if self._pending:
            self._guarded(self._flush)
        if self.error is None:
            self._guarded(lambda: fsync_folder(self._folder))

    def _take(self, name: str, role: str, tensors: Mapping[str, Tensor]) -> None:
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.report.num_bytes += num_bytes
        if self.error is not None:
            return
        self._guarded(lambda: _check(name, tensors, name in self._roles))
        if self.error is not None:
            return
        self._pending[name] = tensors
        self._roles[name] = role
        self._pending_bytes += num_bytes
        if self._pending_bytes >= self._part_bytes:
            self._guarded(self._flush)

    def _flush(self) -> None:
        file = f"rank-{self.report.rank:05d}-part-{len(self.report.files):05d}.safetensors"
        writer = PartWriter(self._folder / file)
        self._on_point("part")
        save_tensors(
            {
                full_name(kind, name): tensor
                for name, tensors in self._pending.items()
                for kind, tensor in tensors.items()
            },
            writer,
        )
        assert writer.entry is not None
        self.report.files[file] = writer.entry
        for name, tensors in self._pending.items():
            kinds: dict[str, Placement] = {
                kind: writer.placements[full_name(kind, name)] for kind in tensors
            }
            self.report.tensors[name] = TensorEntry(
                role=self._roles[name], shape=tuple(tensors[WEIGHT].shape), kinds=kinds
            )
        self._pending, self._pending_bytes = {}, 0
        self._on_point("part_written")

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self.report.is_storage = True
            self._fail(error, storage_problem(error, self._folder))
        except Exception as error:
            self._fail(error, f"{type(error).__name__}: {error}")

    def _fail(self, error: Exception, text: str) -> None:
        self.error, self.report.failure = error, text
        self._pending = {}


def _check(name: str, tensors: Mapping[str, Tensor], repeated: bool) -> None:
    if repeated:
        raise CheckpointError(f"{name}: exported twice")
    if WEIGHT not in tensors:
        raise CheckpointError(f"{name}: exported without its weight (kind {WEIGHT!r})")
    shapes = {kind: tuple(tensor.shape) for kind, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise CheckpointError(f"{name}: weight and state of the optimizer differ in shape {shapes}")


def merge_reports(
    reports: list[ShareReport], names: list[str]
) -> tuple[dict[str, TensorEntry], dict[str, FileEntry]]:
    """Put the reports of all processes together.

    Args:
        reports: one for each rank, none with a failure.
        names: every parameter of the model, in order.

    Returns:
        Tensors in the order of `names`, and files.

    Raises:
        CheckpointError: a parameter was written by several ranks or by none.
    """
    owners: dict[str, int] = {}
    for report in reports:
        for name in report.tensors:
            if name in owners:
                raise CheckpointError(f"{name}: written by ranks {owners[name]} and {report.rank}")
            owners[name] = report.rank
    missing = [name for name in names if name not in owners]
    if missing:
        raise CheckpointError(f"no rank wrote {', '.join(missing[:5])} ({len(missing)} parameters)")
    tensors = {name: reports[owners[name]].tensors[name] for name in names}
    files = {name: entry for report in reports for name, entry in report.files.items()}
    return tensors, files
