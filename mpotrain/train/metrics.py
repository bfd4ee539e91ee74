"""Numbers of a run: where they are written, how fast it goes, how much memory it takes."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from mpotrain.errors import StorageError
from mpotrain.train.journal import JOURNAL_FILE, Journal

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER = "tensorboard"
"""Name of the folder for TensorBoard events in the run folder."""


class MetricsWriter:
    """Writes metrics to `metrics.jsonl` and, if asked for, to TensorBoard.

    On a resume both go on where the checkpoint was: later lines of the journal are dropped,
    later events of TensorBoard are purged, so a curve never has a step twice. `step` is the
    number of steps done, which is also the number of the checkpoint.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        is_main: bool,
        tensorboard: bool,
        resume_step: int | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open the files on the main rank; on all others every method does nothing.

        Args:
            run_folder: folder of the run, created if it is not there.
            is_main: whether this process writes.
            tensorboard: write TensorBoard events too.
            resume_step: step of the checkpoint from which the run goes on, None for a new run.
            now: wall clock for the `time` of each line, in seconds since 1970.

        Raises:
            StorageError: the folder or a file cannot be written.
        """
        self._now = now
        self._journal: Journal | None = None
        self._board: SummaryWriter | None = None
        if not is_main:
            return
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{run_folder}: cannot be created ({error})") from error
        self._journal = Journal(run_folder / JOURNAL_FILE, resume_step=resume_step)
        if tensorboard:
            # Importing TensorBoard takes a second: only where it is used.
            from torch.utils.tensorboard import SummaryWriter

            # A run that died before its first checkpoint has written events too.
            purge = (resume_step or 0) + 1
            with _storage_errors(run_folder / TENSORBOARD_FOLDER):
                self._board = SummaryWriter(
                    log_dir=str(run_folder / TENSORBOARD_FOLDER), purge_step=purge
                )

    @property
    def num_dropped(self) -> int:
        """Lines of the journal that were dropped because the run does their steps again."""
        return 0 if self._journal is None else self._journal.num_dropped

    def write(
        self,
        step: int,
        values: Mapping[str, Any],
        *,
        kind: str = "train",
        histograms: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Write one line, and its numbers as TensorBoard scalars `kind/key`.

        Args:
            step: number of steps done.
            values: JSON values by name; a nested mapping gives the scalars `kind/key/inner key`.
                Lists and strings stand in the journal alone. None is left out.
            kind: what the line is about: "train", "eval", "spectra", "router", "event".
            histograms: counts of the bins 0, 1, 2, ... by name, for TensorBoard alone, as
                `kind/name`; bin n is drawn around n.

        Raises:
            StorageError: the disk is full. Earlier lines are whole.
            ValueError: a value is named "step", "kind" or "time".
        """
        if self._journal is None:
            return
        if taken := {"step", "kind", "time"} & values.keys():
            raise ValueError(f"every line has its own {sorted(taken)}: choose another name")
        present = {key: value for key, value in values.items() if value is not None}
        self._journal.append({"step": step, "kind": kind, "time": self._now(), **present})
        if self._board is not None:
            with _storage_errors(self._journal.path.parent / TENSORBOARD_FOLDER):
                for tag, number in _scalars(present, kind):
                    self._board.add_scalar(tag, number, step)
                for name, counts in (histograms or {}).items():
                    _add_histogram(self._board, f"{kind}/{name}", counts, step)

    def flush(self) -> None:
        """Bring everything to the disk; to be called before a checkpoint is published.

        Raises:
            StorageError: something could not be written.
        """
        if self._journal is not None:
            self._journal.sync()
            if self._board is not None:
                with _storage_errors(self._journal.path.parent / TENSORBOARD_FOLDER):
                    self._board.flush()

    def close(self) -> None:
        """Flush and close both; closing twice does nothing."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None


@final
@dataclass(frozen=True)
class Rate:
    """Speed over some steps.

    Attributes:
        num_steps: steps that were counted.
        num_tokens: tokens of these steps over all ranks.
        seconds: time of these steps.
        mfu: model FLOPs utilisation in [0, 1], None where the peak is not known.
    """

    num_steps: int
    num_tokens: int
    seconds: float
    mfu: float | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second."""
        return self.num_tokens / self.seconds

    @property
    def seconds_per_step(self) -> float:
        """Mean time of one step."""
        return self.seconds / self.num_steps


class Throughput:
    """Measures tokens per second.

    Definition: tokens that count in the loss (no padding, no masked targets), or, where few of a
    sample's tokens are predicted, tokens that the network reads; summed over all ranks, divided by
    the wall time of the loop from the end of the step before to the end of the step; waiting for
    data is inside. Not inside: the first `warmup_steps` after every start (compilation,
    allocation, first reads), and all time under `excluded()` (evaluation, checkpoints, reports).
    Skipped steps count: their work was done.

    MFU = tokens per second x FLOPs per token / peak FLOPs per second of all devices (Chowdhery
    et al. 2022, appendix B), with the same tokens.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        warmup_steps: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock.

        Args:
            flops_per_token: FLOPs of forward and backward for one token, without recomputation.
            peak_flops: FLOPs per second of all devices together at the dtype used; with either
                of the two unknown there is no MFU.
            warmup_steps: steps after this start that do not count.
            clock: monotonic time in seconds.
        """
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._warmup_left = warmup_steps
        self._clock = clock
        self._mark = clock()
        self._away = 0.0
        self._is_away = False
        self._interval = (0, 0, 0.0)
        self._total = (0, 0, 0.0)

    def step_done(self, num_tokens: int) -> None:
        """Count a step that has just ended (its result is on the host, so the device is done).

        Args:
            num_tokens: tokens of the global batch, as the definition says.
        """
        now = self._clock()
        seconds = now - self._mark - self._away
        self._mark, self._away = now, 0.0
        if self._warmup_left > 0:
            self._warmup_left -= 1
            return
        self._interval = _added(self._interval, num_tokens, seconds)
        self._total = _added(self._total, num_tokens, seconds)

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Stop the clock inside this context; inner contexts change nothing."""
        if self._is_away:
            yield
            return
        start = self._clock()
        self._is_away = True
        try:
            yield
        finally:
            self._is_away = False
            self._away += self._clock() - start

    def take(self) -> Rate | None:
        """Return the speed since the last call and begin anew; None when no step counted."""
        rate = self._rate(self._interval)
        self._interval = (0, 0, 0.0)
        return rate

    @property
    def total(self) -> Rate | None:
        """The speed since this start; None when no step counted yet."""
        return self._rate(self._total)

    def _rate(self, sums: tuple[int, int, float]) -> Rate | None:
        num_steps, num_tokens, seconds = sums
        if num_steps == 0 or seconds <= 0:
            return None
        mfu = None
        if self._flops_per_token is not None and self._peak_flops is not None:
            mfu = num_tokens / seconds * self._flops_per_token / self._peak_flops
        return Rate(num_steps, num_tokens, seconds, mfu)


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held up to now, in bytes.

    On CUDA: what the allocator has reserved of the device. On CPU: the largest resident set.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    # getrusage alone would also show the peak of the process that started this one.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _added(sums: tuple[int, int, float], num_tokens: int, seconds: float) -> tuple[int, int, float]:
    return sums[0] + 1, sums[1] + num_tokens, sums[2] + seconds


def _add_histogram(board: SummaryWriter, tag: str, counts: Sequence[float], step: int) -> None:
    """Write counts of the whole numbers 0, 1, 2, ...; TensorBoard would choose other bins."""
    moments = [sum(n**power * count for n, count in enumerate(counts)) for power in (0, 1, 2)]
    # TensorBoard drops empty bins at both ends and takes min and max for the edges of what is left.
    filled = [n for n, count in enumerate(counts) if count] or [0]
    board.add_histogram_raw(
        tag,
        min=filled[0] - 0.5,
        max=filled[-1] + 0.5,
        num=int(moments[0]),
        sum=moments[1],
        sum_squares=moments[2],
        bucket_limits=[n + 0.5 for n in range(len(counts))],
        bucket_counts=list(counts),
        global_step=step,
    )


def _scalars(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            yield f"{prefix}/{key}", float(value)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: TensorBoard events cannot be written ({error})") from error
