"""Micro-batches for one rank: the same global order for every world size, from one integer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mpotrain.batch import Batch
from mpotrain.data.causal import CausalObjective
from mpotrain.data.collation import PADDING_ID as PADDING_ID
from mpotrain.data.collation import Objective, stack_samples
from mpotrain.parallel.plan import batch_layout


class SampleSource(Protocol):
    """What a loader reads; `BlendedDataset` is one."""

    @property
    def sequence_length(self) -> int:
        """Length of the sequences that a network reads (T)."""

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Return sample `index` of the endless training order: int64 (L,).

        L is the objective's: T + 1 where next tokens are predicted.
        """

    def fixed(self, index: int) -> npt.NDArray[np.int64]:
        """Return sample `index` of the unshuffled order, index < num_samples: int64 (L,)."""


class Loader:
    """Cuts the global sample order into the micro-batches of one rank.

    Micro-batch m of a step holds the samples consumed_samples + [m*micro, (m+1)*micro); rank r
    gets m = a * world_size + r in its accumulation slot a. While a step computes, a thread reads
    the next one; it changes when samples are read, never which.

    Args:
        dataset: samples by number.
        global_batch_size: sequences of a step, over all ranks.
        micro_batch_size: sequences of one forward pass.
        objective: what is predicted of a sample; default: its next tokens. It must be the one
            that the data were opened with.
        rank: data-parallel rank.
        world_size: number of data-parallel ranks.
        pin_memory: return page-locked tensors (for asynchronous copies to a CUDA device).
        prefetch: read the next step in the background.

    Attributes:
        layout: how a global batch is cut.

    Raises:
        ParallelError: the sizes do not divide.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        objective: Objective | None = None,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        prefetch: bool = True,
    ) -> None:
        self.layout = batch_layout(global_batch_size, micro_batch_size, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        self._dataset = dataset
        self._objective = objective or CausalObjective(dataset.sequence_length)
        self._rank = rank
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader") if prefetch else None
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self._closed = False

    def microbatches(self, consumed_samples: int) -> list[Batch]:
        """Return this rank's micro-batches of the step that begins at a global position.

        Args:
            consumed_samples: samples that all earlier steps used together, >= 0.

        Returns:
            One batch for each accumulation slot.

        Raises:
            ValueError: a negative position, or the loader is closed.
        """
        self._check_open()
        if consumed_samples < 0:
            raise ValueError(f"samples are counted from 0, got {consumed_samples}")
        pending, self._next = self._next, None
        if pending is not None and pending[0] == consumed_samples:
            batches = pending[1].result()
        else:
            batches = self._read_step(consumed_samples)
        if self._pool is not None:
            following = consumed_samples + self.layout.global_batch_size
            self._next = following, self._pool.submit(self._read_step, following)
        # Pinned here, not in the thread: a thread has no current CUDA device but device 0.
        return [self._pinned(batch) for batch in batches]

    def evaluation_batches(self, num_sequences: int | None = None) -> Iterator[Batch]:
        """Yield this rank's share of a fixed set of sequences, without shuffling.

        All ranks together see the same sequences for every world size, and every rank yields the
        same number of batches. Where they do not divide, rows are filled up with token 0, the
        number `PADDING_ID` and a loss mask that is False throughout.

        Args:
            num_sequences: how many at most; default: all of the split.

        Yields:
            Batches of `micro_batch_size` rows.

        Raises:
            ValueError: fewer than one sequence is asked for, or the loader is closed.
        """
        if num_sequences is not None and num_sequences < 1:
            raise ValueError(f"evaluation needs at least one sequence, got {num_sequences}")
        self._check_open()
        available = self._dataset.num_samples
        wanted = available if num_sequences is None else min(num_sequences, available)
        return self._evaluation(wanted)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the loader is closed")

    def _evaluation(self, wanted: int) -> Iterator[Batch]:
        micro = self.layout.micro_batch_size
        stride = micro * self.layout.world_size
        for round_start in range(0, wanted, stride):
            start = round_start + self._rank * micro
            # Spread over the whole split: its beginning alone would be a few documents.
            numbers = [
                number * self._dataset.num_samples // wanted
                for number in range(start, min(start + micro, wanted))
            ]
            rows = [self._dataset.fixed(number) for number in numbers]
            yield self._pinned(self._batch(rows, numbers, fixed=True))

    def _read_step(self, consumed_samples: int) -> list[Batch]:
        micro = self.layout.micro_batch_size
        batches = []
        for slot in range(self.layout.accumulation):
            start = consumed_samples + micro * self.layout.microbatch(slot, self._rank)
            numbers = range(start, start + micro)
            rows = [self._dataset[number] for number in numbers]
            batches.append(self._batch(rows, numbers, fixed=False))
        return batches

    def _batch(
        self, rows: Sequence[npt.NDArray[np.int64]], numbers: Sequence[int], *, fixed: bool
    ) -> Batch:
        samples = stack_samples(rows, numbers, self._objective.sample_length, fixed=fixed)
        return self._objective.collate(samples, self.layout.micro_batch_size)

    def _pinned(self, batch: Batch) -> Batch:
        return batch.pin_memory() if self._pin_memory else batch

    def close(self) -> None:
        """Stop the background thread; safe to call twice."""
        self._closed = True
        self._next = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
