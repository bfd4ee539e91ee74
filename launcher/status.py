"""`status`: what all runs below some folders are doing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.find_runs import find_runs
from launcher.invoker import user_name
from launcher.run_folder import CHECKPOINTS, RunRecord
from launcher.run_reader import read_run
from launcher.run_state import RunState, Viewer, run_state
from launcher.slurm_queue import QueueAnswer, SlurmQueue
from launcher.table import printable, short_age, short_nodes, short_number, shortened, table
from launcher.waiting import with_parents
from launcher.writer_lock import is_written
from mpotrain.errors import EXIT_DONE, ConfigError
from mpotrain.train.journal import plain_json

HEADINGS = (
    "run", "state", "job", "step", "loss", "tok/s", "updated", "restarts", "nodes", "last outcome",
)  # fmt: skip
NUMBERS = "step loss tok/s updated restarts"
OUTCOME_WIDTH = 60
WATCH_SECONDS = (1.0, 86_400.0)
"""Least and most time between two looks: squeue asks a controller that serves the whole cluster."""
TOLD = frozenset({"unknown", "lost", "gave up", "cancelled", "interrupted"})
"""States whose reasons do not fit into a table, and call for a person."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `status`."""
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="folders in and below which runs are looked for (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="look again after this time, until Ctrl-C"
    )


def main(options: argparse.Namespace) -> int:
    """Print the table once, or again and again.

    Args:
        options: see `add_arguments`.

    Returns:
        The exit code.

    Raises:
        ConfigError: a folder does not exist, or the time between two looks makes no sense.
    """
    folders = options.folders or [Path("runs")]
    if options.watch is None:
        sys.stdout.write(_report(folders, as_json=options.json))
        return EXIT_DONE
    least, most = WATCH_SECONDS
    if not least <= options.watch <= most:
        raise ConfigError([f"--watch: must be {least:g} to {most:g} seconds, is {options.watch:g}"])
    return watch(lambda: _report(folders, as_json=options.json), options.watch)


def watch(
    report: Callable[[], str], seconds: float, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Show a report again and again until Ctrl-C.

    Args:
        report: makes the text.
        seconds: time between two reports.
        sleep: waits.

    Returns:
        The exit code.
    """
    try:
        while True:
            text = report()
            if sys.stdout.isatty():
                # Home, the new text, then clear what the old one has below: no flicker.
                text = "\x1b[H\x1b[2J" + text
            sys.stdout.write(text)
            sys.stdout.flush()
            sleep(seconds)
    except KeyboardInterrupt:
        return EXIT_DONE


def gather(
    folders: Sequence[Path], queue: SlurmQueue
) -> tuple[list[tuple[RunRecord, RunState]], QueueAnswer]:
    """Read run folders and ask the queue for all their jobs at once.

    Args:
        folders: run folders.
        queue: of the cluster.

    Returns:
        The runs with their states, and what the queue said.
    """
    records = [read_run(folder) for folder in folders]
    answer = queue.jobs(job_id for record in records for job_id in record.job_ids)
    return with_parents([(record, state_of(record, answer)) for record in records]), answer


def state_of(record: RunRecord, answer: QueueAnswer) -> RunState:
    """Say what a run is doing, as seen from this process.

    Args:
        record: what its folder says.
        answer: what the queue says of its jobs.
    """
    written = is_written(record.folder / CHECKPOINTS)
    return run_state(record, answer, Viewer(platform.node(), user_name(), written))


def row(record: RunRecord, state: RunState, now: float) -> tuple[str, ...]:
    """Return the cells of a run, in the order of `HEADINGS`.

    Args:
        record: what its folder says.
        state: what it is doing.
        now: seconds since 1970.
    """
    metrics = record.metrics
    step = metrics.step if metrics is not None else record.saved_step
    loss = metrics.loss if metrics is not None else None
    rate = metrics.tokens_per_second if metrics is not None else None
    reason = f" ({state.detail})" if state.word == "queued" and state.detail else ""
    stopping = ", stop asked for" if record.stop_requested and not state.has_ended else ""
    nodes = state.job.nodes if state.job is not None else ""
    updated = record.updated
    return (
        _shown_path(record.folder),
        state.word + reason + stopping,
        state.job.job_id if state.job is not None else (record.job_ids[-1:] or ("-",))[0],
        "-" if step is None else f"{step}/{record.num_steps or '?'}",
        "-" if loss is None else f"{loss:.4f}",
        "-" if rate is None else short_number(rate),
        "-" if updated is None else short_age(now - updated),
        str(max(0, record.num_starts - 1)),
        nodes or short_nodes(record.nodes) or "-",
        "-" if record.outcome is None else shortened(record.outcome.text, OUTCOME_WIDTH),
    )


def as_json(record: RunRecord, state: RunState) -> dict[str, Any]:
    """Return everything known of a run in JSON types; what is not known is null.

    Args:
        record: what its folder says.
        state: what it is doing.
    """
    metrics, outcome = record.metrics, record.outcome
    found = {
        "folder": str(record.folder),
        "name": record.name,
        "state": state.word,
        "detail": state.detail,
        "job_id": state.job.job_id if state.job is not None else None,
        "job_state": state.job.state if state.job is not None else None,
        "job_ids": record.job_ids,
        "step": metrics.step if metrics is not None else None,
        "num_steps": record.num_steps,
        "saved_step": record.saved_step,
        "loss": metrics.loss if metrics is not None else None,
        "tokens_per_second": metrics.tokens_per_second if metrics is not None else None,
        "updated": record.updated,
        "restarts": max(0, record.num_starts - 1),
        "nodes": record.nodes,
        "stop_requested": record.stop_requested,
        "outcome": outcome.outcome if outcome is not None else None,
        "reason": outcome.reason if outcome is not None else None,
        "outcome_detail": outcome.detail if outcome is not None else None,
        "damaged": record.damaged,
    }
    plain: dict[str, Any] = plain_json(found)
    return plain


def _report(folders: Sequence[Path], *, as_json: bool) -> str:
    found = find_runs(folders)
    runs, answer = gather(found.folders, SlurmQueue())
    if as_json:
        return _json_text(runs)
    lines = [table(HEADINGS, [row(*run, time.time()) for run in runs], right=NUMBERS)]
    if not runs:
        lines = [f"no runs below {', '.join(map(str, folders))}"]
    if not answer.known:
        lines.append(
            printable(f"states of jobs are unknown, no word of the queue: {answer.problem}")
        )
    for record, state in runs:
        # What is wrong with the queue was said once for all.
        detail = state.detail.removeprefix(answer.problem).removeprefix("; ")
        if state.word in TOLD and detail:
            lines.append(printable(f"{_shown_path(record.folder)}: {state.word}: {detail}"))
    for record, _ in runs:
        lines += [printable(f"{_shown_path(record.folder)}: {text}") for text in record.damaged]
    lines += [printable(note) for note in found.notes]
    return "\n".join(lines) + "\n"


def _json_text(runs: Sequence[tuple[RunRecord, RunState]]) -> str:
    return json.dumps([as_json(*run) for run in runs], indent=1) + "\n"


def _shown_path(folder: Path) -> str:
    """Return a folder as seen from here, if that is shorter."""
    relative = os.path.relpath(folder)
    return min(str(folder), relative, key=len)
