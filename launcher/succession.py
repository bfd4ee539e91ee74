"""Whether a job that was submitted in the place of another one is still wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from launcher.life_log import Record
from launcher.slurm_control import SUBMIT_SECONDS, SlurmControl
from launcher.slurm_queue import RUNNING_STATES

CLAIM_SECONDS = SUBMIT_SECONDS + 60.0
"""How long a new job waits for word from the one whose place it takes, which may itself wait for an
answer of sbatch."""


def successor_of(records: Sequence[Record], job_id: str) -> str | None:
    """Return the job that has taken the place of a job; None where none has.

    SLURM may start a job again whose node it has given up, after the job has found a successor.

    Args:
        records: lines of the run.
        job_id: the job.
    """
    for record in reversed(records):
        if record.get("job_id") == job_id and record["event"] in ("resubmitted", "requeued"):
            return str(record.get("next_job")) if record["event"] == "resubmitted" else None
    return None


def is_successor(
    read: Callable[[], Sequence[Record]],
    predecessor: str,
    number: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether a job has not been overtaken by the one that submitted it.

    That one may have got no answer from sbatch and then have put itself back into the queue. Two
    jobs must not train into one folder, so the new one waits until the other has said what it did.

    Args:
        read: how to read the lines of the run.
        predecessor: the job that submitted the new one.
        number: the new job.
        sleep: how to wait.
    """
    end = time.monotonic() + CLAIM_SECONDS
    while True:
        for record in reversed(read()):
            if record.get("job_id") != predecessor:
                continue
            if record["event"] == "resubmitted":
                return bool(record.get("next_job") == number)
            if record["event"] in ("started", "requeued"):
                break  # it has not said yet, or not yet seen, what became of its last life
        if time.monotonic() >= end:
            state = SlurmControl(predecessor, predecessor).state().state
            return state not in {*RUNNING_STATES, "PENDING", "REQUEUED", "COMPLETING"}
        sleep(2.0)
