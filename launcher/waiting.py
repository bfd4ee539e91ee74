"""Why a run that waited for others has never started (no I/O).

SLURM takes a job whose condition can no longer be met out of the queue without a word, and forgets
it some minutes later. What it waited for stands in its submission.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.run_folder import RunRecord
from launcher.run_state import RunState

Run = tuple[RunRecord, RunState]


def with_parents(runs: Sequence[Run]) -> list[Run]:
    """Say of runs that have left the queue unstarted what they waited for.

    Args:
        runs: runs with their states; those that others waited for are looked up among them.

    Returns:
        The same runs. One that waited for a run without a good end is "cancelled", even where the
        queue has forgotten its job.
    """
    owners = {job_id: run for run in runs for job_id in run[0].job_ids}
    return [(record, _with_parents(record, state, owners)) for record, state in runs]


def _with_parents(record: RunRecord, state: RunState, owners: Mapping[str, Run]) -> RunState:
    last = record.last_event
    never_began = last is None or last.event == "submitted"
    if state.word not in ("cancelled", "lost") or not never_began or not record.waits_for:
        return state
    parents = [owners[one] for one in record.waits_for if one in owners]
    failed = [
        str(parent.folder)
        for parent, its_state in parents
        if its_state.has_ended and its_state.word not in ("done", "held")
    ]
    waited = f"{state.detail}: it waited for the good end of"
    if failed:
        names = ", ".join(dict.fromkeys(failed))
        return RunState("cancelled", f"{waited} {names}, which did not come; submit both again")
    return RunState(state.word, f"{waited} job {', '.join(record.waits_for)}")
