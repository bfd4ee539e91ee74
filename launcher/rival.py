"""Whether somebody else trains into the run folder already: another job, or a process unseen.

The ranks of a second job would be refused by the lock of the checkpoints, but not before the job
had deleted the outcome of the first one, taken its checkpoints for its own progress, and perhaps
obeyed a stop file that was meant for the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.life_history import chain_of
from launcher.life_log import Record
from launcher.slurm_control import SlurmControl
from launcher.slurm_queue import RUNNING_STATES
from launcher.writer_lock import holder_of, is_written
from mpotrain.checkpoint.lock import LOCK_NAME

logger = logging.getLogger(__name__)

LOCK_SECONDS = 1800.0
"""How long to wait for the lock: a file server keeps that of a lost node for a minute or two, and
ranks of a node that only SLURM has lost end after `train.hang_timeout_minutes`."""
MARGIN_SECONDS = 300.0
"""For such ranks to end."""
LOOK_SECONDS = 5.0
_ALIVE = frozenset({"started", "preflight", "warned"})
"""What a job has written last while it trains."""


def rival_of(records: Sequence[Record], job_id: str, continues: str | None) -> str | None:
    """Return another job that trains the run at this moment, None where there is none.

    The lock is no witness here: the ranks of the other job may not have taken it yet, and some file
    systems grant it to every node.

    Args:
        records: lines of the run.
        job_id: the job that asks.
        continues: the job whose place it takes, which may still be about to leave.
    """
    chain = chain_of(records, job_id, continues)
    own = {job_id, continues, *(line.get("job_id") for line in chain)}
    # The login node may write down what it has submitted after the job has begun.
    told = [line for line in records if line["event"] != "submitted"]
    newest = {str(line.get("job_id")): line["event"] for line in told}
    for other, event in reversed(newest.items()):
        if event not in _ALIVE or other in own:
            continue
        # One that was killed has not written its end either, so SLURM has the last word.
        if SlurmControl(other, other).state().state in RUNNING_STATES:
            return other
    return None


def lock_patience(hang_minutes: float) -> float:
    """Return the seconds to wait for the lock of a run.

    Args:
        hang_minutes: its `train.hang_timeout_minutes`.
    """
    return max(LOCK_SECONDS, 60 * hang_minutes + MARGIN_SECONDS)


def await_lock(
    checkpoints: Path,
    seconds: float = LOCK_SECONDS,
    *,
    sleep: Callable[[float], None] = time.sleep,
    is_called: Callable[[], bool] = lambda: False,
) -> str:
    """Wait until no process holds the lock of the checkpoints.

    Args:
        checkpoints: the folder of the checkpoints.
        seconds: how long to wait.
        sleep: how to wait.
        is_called: whether a signal or a stop file has come, which ends the waiting.

    Returns:
        Who holds it still, in words; empty where nobody does, it cannot be asked for, or somebody
        called: whoever obeys that starts no ranks.
    """
    looks = int(seconds / LOOK_SECONDS)
    for look in range(looks):
        if not is_written(checkpoints):
            return ""
        if look == 0:
            holder = holder_of(checkpoints)
            logger.warning("%s is locked by %s: waiting", checkpoints / LOCK_NAME, holder)
        sleep(LOOK_SECONDS)
        if is_called():
            return ""
    if not is_written(checkpoints):
        return ""
    return (
        f"{checkpoints / LOCK_NAME} has been locked for {seconds / 60:g} minutes by "
        f"{holder_of(checkpoints)}, which writes checkpoints here, but is of no job of this run "
        "that SLURM still runs: end it; if its node is lost and the file server keeps the lock, "
        "delete that file"
    )
