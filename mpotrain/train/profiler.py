"""A profiler trace of a few steps of a run."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from mpotrain.errors import StorageError
from mpotrain.train.config import ProfileConfig

PROFILE_FOLDER = "profile"
"""Name of the folder for traces in the run folder."""


class StepProfiler:
    """Records the steps that the configuration names, and writes one trace file.

    To be used as a context, with `before_step` and `after_step` around every step. A run that
    ends inside the recorded steps writes what it has. Without a configuration, or on a rank that
    shall not record, it does nothing.

    Attributes:
        trace_file: the trace (Chrome format, also read by Perfetto), None until it is written.
        snapshot_file: the CUDA memory snapshot, None if there is none.
    """

    def __init__(
        self, config: ProfileConfig | None, run_folder: Path, *, rank: int, device: torch.device
    ) -> None:
        """Prepare; nothing is recorded and no file is made before the first step to record.

        Args:
            config: which steps; None for no profile.
            run_folder: folder of the run.
            rank: number of this process, part of the file names.
            device: device on which the model runs.
        """
        self._config = config
        if config is not None and rank != 0 and not config.all_ranks:
            self._config = None
        self._folder = run_folder / PROFILE_FOLDER
        self._rank, self._device = rank, device
        self._recorder: profile | None = None
        self._first_step = 0
        self.trace_file: Path | None = None
        self.snapshot_file: Path | None = None

    def __enter__(self) -> StepProfiler:
        """Return the profiler itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the trace if the run ends within the recorded steps."""
        if self._recorder is not None:
            self._finish()

    def before_step(self, step: int) -> None:
        """Start recording if `step` (counted from 0) is within the steps to record.

        A run that resumes in their middle records those that are left.
        """
        config = self._config
        if config is None or self._recorder is not None:
            return
        if not config.start_step <= step < config.start_step + config.num_steps:
            return
        cuda = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        if cuda and config.memory:
            torch.cuda.memory._record_memory_history()
        self._first_step = step
        self._recorder = profile(
            activities=activities,
            record_shapes=True,
            profile_memory=config.memory,
            with_stack=config.with_stack,
        )
        self._recorder.start()

    def after_step(self, step: int) -> None:
        """Stop recording and write the trace if `step` was the last one to record.

        Raises:
            StorageError: the trace cannot be written.
        """
        config = self._config
        if config is None or self._recorder is None:
            return
        if step >= config.start_step + config.num_steps - 1:
            self._finish()

    def _finish(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None or self._config is None:
            return
        recorder.stop()
        stem = f"step-{self._first_step:08}-rank{self._rank}"
        trace, snapshot = self._folder / f"{stem}.json.gz", self._folder / f"{stem}.memory.pickle"
        temporary = self._folder / f"{stem}.tmp-{uuid.uuid4().hex[:8]}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recorder.export_chrome_trace(str(temporary))
            temporary.replace(trace)
            if self._device.type == "cuda" and self._config.memory:
                torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]
                self.snapshot_file = snapshot
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StorageError(f"{trace}: the trace cannot be written ({error})") from error
        finally:
            if self._device.type == "cuda" and self._config.memory:
                torch.cuda.memory._record_memory_history(enabled=None)
        self.trace_file = trace
