"""One rank of one start, from its launcher's environment to its exit code: watched and recorded."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from mpotrain.assemble import prepare_torch
from mpotrain.config import RunSettings
from mpotrain.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_HUNG,
    EXIT_STOPPED,
    ConfigError,
    LostRankError,
    MpotrainError,
    StorageError,
)
from mpotrain.parallel.environment import resolve_environment
from mpotrain.parallel.flight import keep_collectives
from mpotrain.parallel.hang_folder import Hang
from mpotrain.parallel.ranks import World, close_world, init_world
from mpotrain.parallel.watch import watch_parent
from mpotrain.parallel.watchdog import Beat, Watchdog, collective_timeout
from mpotrain.run_end import FAILED, HUNG, LOST_RANK, OUTCOME_FILE, EndRecord, RunEnd
from mpotrain.run_record import CHECKPOINTS
from mpotrain.start import Start
from mpotrain.train.signals import StopReason, StopRequest
from mpotrain.train.state import Outcome

RECORD_SECONDS = 10.0
"""How long ranks wait for rank 0 to record an end that came to all of them."""
StartFactory = Callable[[World, StopRequest, ExitStack, Beat], Start]
"""Opens the data of a run on one rank."""


def launch(run: RunSettings, build: StartFactory, *, fresh: bool, profile: bool) -> int:
    """Run one start as one rank of its world.

    Args:
        run: the validated run.
        build: called once this rank has joined the world.
        fresh: refuse to go on with what the run folder holds.
        profile: record a few steps even if the run file asks for none.

    Returns:
        The exit code: done, or stopped on request.

    Raises:
        MpotrainError: see the subclasses; the outcome file of the run folder says so too.
    """
    prepare_torch(run)
    return _Launch(run).go(build, fresh, profile)


class _Launch:
    """What stands around a start on this rank, from before the ranks meet until they part."""

    def __init__(self, run: RunSettings) -> None:
        folder = Path(run.folder)
        self._run, self._ranks = run, resolve_environment(os.environ)
        self._start: Start | None = None
        self._record = EndRecord(folder, folder / CHECKPOINTS)
        limit = run.train.time_limit_minutes
        self._stop = StopRequest(
            folder,
            time_limit_seconds=None if limit is None else 60 * limit,
            watch_file=self._ranks.rank == 0,
        )
        self._watchdog = Watchdog(
            run.train.hang_timeout_seconds,
            folder,
            rank=self._ranks.rank,
            size=self._ranks.size,
            on_hang=self._hung,
            has_ended=(folder / OUTCOME_FILE).exists,
        )

    def go(self, build: StartFactory, fresh: bool, profile: bool) -> int:
        ranks = self._ranks
        # Signals count from here on: one that comes while the model is built or a checkpoint is
        # read stops the run at its first step instead of killing it. So does a launcher that dies.
        with self._stop, self._watchdog, ExitStack() as outer:
            try:
                if ranks.size > 1:
                    keep_collectives(os.environ)
                    outer.enter_context(watch_parent(self._orphaned))
                world = self._meet()
                outer.callback(self._part, world)
                return self._train(world, build, fresh, profile)
            except Exception as error:
                # Peers that hung and ended look like lost ones.
                self._watchdog.yield_to_hang()
                is_lost = ranks.size > 1 and is_lost_peer(error)
                if ranks.rank == 0:
                    self._failed(error, is_lost)
                elif isinstance(error, MpotrainError) and not is_lost:
                    self._await_record()
                if is_lost and not isinstance(error, MpotrainError):
                    raise LostRankError(
                        "the connection to another rank broke, which has failed or was killed; "
                        f"its own log says why ({error})"
                    ) from error
                raise

    def _meet(self) -> World:
        run, ranks = self._run, self._ranks
        if problems := run.problems(ranks.size):
            raise ConfigError([f"with {ranks.size} process(es): {problem}" for problem in problems])
        self._watchdog.beat("meeting the other ranks")
        return init_world(
            run.engine.kind, run.engine.device, ranks=ranks, parallel=run.parallel,
            timeout=collective_timeout(run.train.hang_timeout_seconds),
        )  # fmt: skip

    def _part(self, world: World) -> None:
        self._watchdog.beat("leaving the other ranks")
        close_world(world)

    def _train(self, world: World, build: StartFactory, fresh: bool, profile: bool) -> int:
        run, watchdog = self._run, self._watchdog
        watchdog.met(world.broadcast_object(uuid.uuid4().hex[:12]))
        with ExitStack() as stack:
            watchdog.beat("opening the data")
            start = self._start = build(world, self._stop, stack, watchdog.beat)
            outcome, state = start.go(fresh, profile)
            watchdog.beat("closing", state.step)
        is_stopped = outcome is Outcome.STOPPED
        code = EXIT_STOPPED if is_stopped else EXIT_DONE
        if world.is_main:
            reason = StopReason(self._stop.requested()) if is_stopped else None
            detail = f"step {state.step}" + (f": {reason.text}" if reason else "")
            end = RunEnd(
                outcome=outcome, detail=detail, exit_code=code,
                reason=reason.name if reason else None, step=state.step,
            )  # fmt: skip
            self._record.write(end, begun=True)
            # Now that the end is on record; whoever reads of another reason must still find what
            # a person asked for.
            if reason is StopReason.STOP_FILE:
                self._stop.acknowledge()
        # Launchers kill the other ranks when one has left with another code than 0.
        world.barrier()
        start.progress.note(f"{outcome}: {run.name} at step {state.step:,} of {run.train.steps:,}")
        return code

    def _failed(self, error: Exception, is_lost: bool) -> None:
        step = self._watchdog.step if self._has_begun else None
        if is_lost:
            end = RunEnd(
                outcome=Outcome.STOPPED, detail=f"another rank was lost ({error})",
                exit_code=LostRankError.exit_code, reason=LOST_RANK, step=step,
            )  # fmt: skip
        else:
            code = error.exit_code if isinstance(error, MpotrainError) else EXIT_CRASH
            detail = f"{type(error).__name__}: {error}"
            end = RunEnd(outcome=FAILED, detail=detail, exit_code=code, step=step)
        with suppress(StorageError):
            self._record.write(end, begun=self._has_begun)

    def _await_record(self) -> None:
        """Give rank 0 time to write how the run ended, before this rank leaves.

        What ends all ranks alike is recorded by rank 0, which a launcher kills when another rank
        has left with an error.
        """
        if not self._has_begun:
            return
        end = time.monotonic() + RECORD_SECONDS
        outcome = Path(self._run.folder) / OUTCOME_FILE
        while not outcome.exists() and time.monotonic() < end:
            time.sleep(0.1)

    def _hung(self, hang: Hang) -> None:
        """Record the end in the thread of the watchdog."""
        end = RunEnd(
            outcome=FAILED, detail=hang.describe(), exit_code=EXIT_HUNG, reason=HUNG,
            step=hang.step if self._has_begun else None,
        )  # fmt: skip
        self._record.write(end, begun=self._has_begun)

    def _orphaned(self) -> None:
        """Save and stop at the next step; others of this launcher may be gone already."""
        self._stop.request(StopReason.LAUNCHER_DIED)
        self._watchdog.hurry()

    @property
    def _has_begun(self) -> bool:
        return self._start is not None and self._start.has_begun


def is_lost_peer(error: Exception) -> bool:
    """Whether work failed because another rank is gone (gloo has no type for that)."""
    if isinstance(error, LostRankError | torch.distributed.DistError):
        return True
    signs = (
        "closed by peer",
        "Connection reset",
        "Connection refused",
        "Broken pipe",
        "Timed out waiting",
        "timeout caused pair closure",
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
