"""Which checkpoints may go (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpotrain.checkpoint.config import CheckpointConfig


def expired_steps(
    steps: Sequence[int],
    config: CheckpointConfig,
    *,
    is_complete: Callable[[int], bool],
    protected: int | None,
) -> list[int]:
    """Return the steps whose checkpoints are to be deleted.

    Only complete checkpoints count towards `keep_last`, so that damaged ones never push the last
    good one out. Nothing is deleted before `keep_last` complete ones have been found.

    Args:
        steps: steps of all checkpoints, newest first.
        config: what to keep.
        is_complete: whether the checkpoint of a step has all its files.
        protected: newest step that is known to be good; never deleted.
    """
    num_kept = 0
    expired = []
    for step in steps:
        if num_kept < config.keep_last:
            num_kept += is_complete(step)
        elif step != protected and not (config.keep_every and step % config.keep_every == 0):
            expired.append(step)
    return expired
