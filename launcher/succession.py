"""Whether a job that was submitted in the place of another one is still wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from launcher.journal import PATIENT_ATTEMPTS, PAUSE_SECONDS
from launcher.life_log import Record
from launcher.slurm_control import SUBMIT_SECONDS, SlurmControl
from launcher.slurm_queue import RUNNING_STATES

CLAIM_SECONDS = SUBMIT_SECONDS + 60.0
"""How long a new job waits for word from the one whose place it takes, which may itself wait for an
answer of sbatch."""
LATE_SECONDS = PATIENT_ATTEMPTS * PAUSE_SECONDS
"""How much longer it waits for one that runs: the disk may fail on which it would say so."""


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
    One that could not say it any more has meant the run to go on: it is no rival while SLURM clears
    it away, which takes minutes beside a dead node, and would leave the run to this job if it came
    back.

    Args:
        read: how to read the lines of the run.
        predecessor: the job that submitted the new one.
        number: the new job.
        sleep: how to wait.
    """
    end = time.monotonic() + CLAIM_SECONDS
    while True:
        records = read()
        for record in reversed(records):
            if record.get("job_id") != predecessor:
                continue
            if record["event"] == "resubmitted":
                return bool(record.get("next_job") == number)
            if record["event"] in ("started", "requeued"):
                break  # it has not said yet, or not yet seen, what became of its last life
        if (now := time.monotonic()) >= end:
            state = SlurmControl(predecessor, predecessor).state().state
            goes_on = _has_ended_to_go_on(records, predecessor)
            # One that runs may have trouble to write a line, which it tries for ten minutes.
            if not (state in RUNNING_STATES and now < end + LATE_SECONDS):
                alive = {*RUNNING_STATES, "PENDING", "REQUEUED"}
                return state not in (alive if goes_on else {*alive, "COMPLETING"})
        sleep(2.0 if now < end else PAUSE_SECONDS)


def _has_ended_to_go_on(records: Sequence[Record], job_id: str) -> bool:
    """Whether the last word of a job is that its life has ended and another one shall follow."""
    own = [record for record in records if record.get("job_id") == job_id]
    return bool(own) and own[-1]["event"] == "ended" and own[-1].get("decision") == "restart"
