"""Saving, finding and opening the checkpoints of a run, together with all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.folders import (
    discard,
    new_tag,
    published,
    recover,
    remove_tree,
    step_name,
    storage_problem,
)
from mpotrain.checkpoint.lock import FolderLock
from mpotrain.checkpoint.manifest import Manifest, RunState, Signature, fingerprint
from mpotrain.checkpoint.manifest_file import FORMAT, library_versions, read_manifest
from mpotrain.checkpoint.publish import publish
from mpotrain.checkpoint.reader import CheckpointReader
from mpotrain.checkpoint.retention import expired_steps
from mpotrain.checkpoint.share import (
    ShareReport,
    ShareWriter,
    StateTensorLike,
    merge_reports,
)
from mpotrain.checkpoint.verify import file_problems
from mpotrain.errors import CheckpointError, MpotrainError, StorageError
from mpotrain.parallel.ranks import World

PART_BYTES = 256 << 20
"""Size from which a data file is closed and the next one begun; bounds the memory of a save."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


def _ignore_point(name: str) -> None:
    """Do nothing at a named point."""


class CheckpointStore:
    """The checkpoints in one folder that all ranks share.

    Unless a method says otherwise, it is collective: all ranks call it with the same arguments,
    and all return or raise the same. Rank 0 alone decides, names, publishes and deletes.

    Attributes:
        folder: folder of all checkpoints.
        config: interval, retention, verification.
        world: the ranks.
        rejected: why checkpoints were skipped, by step.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        world: World,
        *,
        part_bytes: int = PART_BYTES,
        on_point: Callable[[str], None] = _ignore_point,
    ) -> None:
        """Look at a folder; nothing is read, created or locked yet.

        Args:
            folder: folder of all checkpoints; need not exist.
            config: interval, retention, verification.
            world: the ranks.
            part_bytes: size from which a data file is closed and the next one begun.
            on_point: told the name of every point that a save passes on this rank: `begin`,
                `part`, `part_written`, `reported`, `manifest`, `set_aside`, `published`,
                `pointer`, `replaced_hidden`, `expired_hidden`, `end`; and `examined` after each
                file of a checkpoint that is verified.
        """
        self.folder = folder
        self.config = config
        self.world = world
        self.rejected: dict[int, list[str]] = {}
        self._part_bytes = part_bytes
        self._on_point = on_point
        self._lock = FolderLock(folder)
        self._good: int | None = None
        self._verified: dict[int, CheckpointReader] = {}

    def claim(self) -> None:
        """Take the folder for writing and clean up what dead runs have left.

        A training run calls it once at its start; `save` does so too.

        Raises:
            CheckpointError: another live process writes there.
            StorageError: the folder cannot be made.
        """

        def take() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for name in recover(self.folder):
                logger.info("%s: left by an unfinished save, cleaned up", self.folder / name)

        self._on_main(take)

    def save(self, run: RunState, tensors: Iterable[StateTensorLike]) -> Path:
        """Write a checkpoint and publish it when all ranks have written their share.

        Args:
            run: position of the run; rank 0's counts.
            tensors: every parameter once, in the same order on every rank; the tensors stand on
                exactly one rank.

        Returns:
            The folder of the checkpoint. Older ones beyond retention are gone.

        Raises:
            StorageError: a rank could not write; what was complete before is intact.
            CheckpointError: the exported tensors or the run state cannot be stored, or another
                live process writes there.
        """
        self.claim()
        self._on_point("begin")
        draft = self._on_main(lambda: self._make_draft(run.step))
        writer = ShareWriter(draft, self.world.rank, self._part_bytes, self._on_point)
        writer.write(tensors)
        reports = self.world.gather_objects(writer.report)
        self._on_point("reported")
        try:
            self._require_success(reports, run.step, writer.error)
            path = self._on_main(lambda: self._publish(draft, run, reports, writer.names))
        except MpotrainError:
            if self.world.is_main:
                remove_tree(draft)
            raise
        self._good = run.step
        self._verified.pop(run.step, None)
        self.rejected.pop(run.step, None)
        self.retain()
        self._on_point("end")
        return path

    def retain(self) -> list[int]:
        """Delete the checkpoints beyond retention and return their steps.

        The newest checkpoint that this store has published or verified is never deleted, nor
        anything while there are fewer complete ones than `keep_last`. Failures are logged.
        """
        return self._on_main(self._retain)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, newest first, without looking into them."""
        return self._on_main(lambda: list(published(self.folder)))

    def latest(self) -> Manifest | None:
        """Return the manifest of the newest sound checkpoint, the same on every rank.

        Damaged checkpoints are skipped; `rejected` and the log say what is wrong with them.

        Returns:
            The manifest, or None where nothing has ever been published.

        Raises:
            CheckpointError: there are checkpoints, but every one is damaged.
        """
        steps = self.steps()
        for step in steps:
            manifest, problems = self._examine(step)
            if manifest is not None and not problems:
                return manifest
            self.rejected[step] = problems
            if self.world.is_main:
                logger.warning("checkpoint of step %d skipped: %s", step, "; ".join(problems[:5]))
        if steps:
            lines = [f"  step {step}: {self.rejected[step][0]}" for step in steps]
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be used; starting anew would lose the run, so "
                "move the folder away if that is wanted\n" + "\n".join(lines)
            )
        return None

    def open(self, step: int) -> CheckpointReader:
        """Open the checkpoint of `step` for reading; it is verified first unless `latest` did so.

        Raises:
            CheckpointError: no such checkpoint, or it is damaged.
        """
        if step not in self._verified:
            _, problems = self._examine(step)
            if problems:
                self.rejected[step] = problems
                raise CheckpointError(
                    f"the checkpoint of step {step} cannot be used:\n" + "\n".join(problems[:5])
                )
        return self._verified[step]

    def close(self) -> None:
        """Give the folder back to other writers; not collective."""
        self._lock.release()

    def _make_draft(self, step: int) -> Path:
        draft = self.folder / f"{step_name(step)}.tmp-{new_tag()}"
        draft.mkdir()
        return draft

    def _require_success(
        self, reports: list[ShareReport], step: int, error: Exception | None
    ) -> None:
        failed = [report for report in reports if report.failure is not None]
        if not failed:
            return
        lines = [
            f"  rank {report.rank}, whose share is {report.num_bytes:,} bytes: {report.failure}"
            for report in failed
        ]
        kind = StorageError if any(report.is_storage for report in failed) else CheckpointError
        raise kind(
            f"{self.folder}: the checkpoint of step {step} was not written; earlier ones are "
            "intact\n" + "\n".join(lines)
        ) from error

    def _publish(
        self, draft: Path, run: RunState, reports: list[ShareReport], names: list[str]
    ) -> Path:
        tensors, files = merge_reports(reports, names)
        parameters: dict[str, Signature] = {
            name: (entry.role, entry.shape) for name, entry in tensors.items()
        }
        manifest = Manifest(
            format=FORMAT,
            run=run,
            versions=library_versions(),
            fingerprint=fingerprint(parameters),
            tensors=tensors,
            files=files,
        )
        try:
            return publish(draft, manifest, self._on_point)
        except BaseException:
            recover(self.folder)
            raise

    def _retain(self) -> list[int]:
        paths = published(self.folder)
        expired = expired_steps(
            list(paths), self.config, is_complete=self._is_complete, protected=self._good
        )
        return [
            step
            for step in expired
            if discard(paths[step], lambda: self._on_point("expired_hidden"))
        ]

    def _is_complete(self, step: int) -> bool:
        path = published(self.folder)[step]
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            return False
        return manifest.step == step and not file_problems(path, manifest, digests=False)

    def _examine(self, step: int) -> tuple[Manifest | None, list[str]]:
        """Check a checkpoint; each rank looks at its share of the files, and all learn all."""
        try:
            path, manifest = self._on_main(lambda: self._read(step))
        except CheckpointError as error:
            return None, [str(error)]
        mine = list(manifest.files)[self.world.rank :: self.world.size]
        found = file_problems(
            path, manifest, digests=self.config.verify, names=mine,
            on_file=lambda: self._on_point("examined"),
        )  # fmt: skip
        problems = [line for lines in self.world.gather_objects(found) for line in lines]
        if not problems:
            self._verified[step] = CheckpointReader(path, manifest)
            self._good = max(step, self._good or 0)
        return manifest, problems

    def _read(self, step: int) -> tuple[Path, Manifest]:
        path = published(self.folder).get(step)
        if path is None:
            known = ", ".join(map(str, published(self.folder))) or "none"
            raise CheckpointError(
                f"{self.folder}: no checkpoint of step {step}; there are: {known}"
            )
        manifest = read_manifest(path)
        if manifest.step != step:
            raise CheckpointError(
                f"{path}: the manifest is that of step {manifest.step}; the folder was renamed"
            )
        return path, manifest

    def _on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0; all ranks return its result or raise its error."""
        value: T | None = None
        error: MpotrainError | None = None
        cause: OSError | None = None
        bug: Exception | None = None
        if self.world.is_main:
            try:
                value = action()
            except MpotrainError as raised:
                error = raised
            except OSError as raised:
                error, cause = (
                    StorageError(f"rank 0: {storage_problem(raised, self.folder)}"),
                    raised,
                )
            except Exception as raised:
                error, bug = CheckpointError(f"rank 0: {type(raised).__name__}: {raised}"), raised
        value, error = self.world.broadcast_object((value, error))
        if bug is not None:
            raise bug
        if error is not None:
            raise error from cause
        return value  # type: ignore[return-value]
