"""Reading a run folder so that no state of its files can do harm.

The files belong to a live run: any of them may be absent, half written by a killed process, or
gigabytes long. What cannot be read is named and left out.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.file_ends import lines_backwards
from launcher.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LAUNCH,
    LIVES_FILE,
    OUTCOME_FILE,
    RUN_FILE,
    SUBMISSION_FILE,
    LastMetrics,
    LifeEvent,
    Outcome,
    RunRecord,
)
from launcher.slurm_queue import JOB_ID
from mpotrain.checkpoint.folders import published
from mpotrain.train.journal import JOURNAL_FILE
from mpotrain.train.signals import STOP_FILE

MAX_BYTES = 1 << 24
"""A small file (configuration, outcome, lives) that is longer than this is not what it says."""
TAIL_BYTES = 1 << 23
"""How far back in the metrics the last training line is looked for; spectra make long lines."""


def read_run(folder: Path) -> RunRecord:
    """Read what a run folder says; never fails.

    Args:
        folder: the run folder.
    """
    reader = _Reader(folder)
    submission = reader.json_object(f"{LAUNCH}/{SUBMISSION_FILE}")
    lives = reader.lives()
    name, num_steps = reader.settings()
    job_ids: dict[str, None] = {}
    named = [job_id for life in lives for job_id in (life.job_id, life.next_job)]
    for job_id in (*named, _text(submission.get("job_id"))):
        if job_id is not None and JOB_ID.fullmatch(job_id):
            job_ids.setdefault(job_id)
    return RunRecord(
        folder=folder,
        name=name or folder.name,
        num_steps=num_steps,
        user=_text(submission.get("user")),
        host=reader.host(),
        job_ids=tuple(job_ids),
        waits_for=_waits_for(submission.get("sbatch")),
        lives=lives,
        metrics=reader.metrics(),
        saved_step=reader.saved_step(),
        outcome=reader.outcome(),
        stop_requested=(folder / STOP_FILE).exists(),
        damaged=tuple(reader.damaged),
    )


class _Reader:
    """Reads the files of one folder and collects what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[str] = []

    def content(self, name: str) -> bytes | None:
        """Return a small file; None where it is absent, or unreadable and named so."""
        try:
            with (self.folder / name).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.damaged.append(f"{name}: cannot be read ({error.strerror or error})")
            return None
        if len(data) > MAX_BYTES:
            self.damaged.append(f"{name}: is longer than {MAX_BYTES >> 20} MiB")
            return None
        return data

    def json_object(self, name: str) -> dict[str, Any]:
        """Return a file with one JSON object; empty where there is none."""
        data = self.content(name)
        if data is None:
            return {}
        found = _json_object(data)
        if found is None:
            self.damaged.append(f"{name}: is no JSON object (damaged or half written)")
        return found or {}

    def settings(self) -> tuple[str | None, int | None]:
        """Return name and number of steps of the newest readable configuration."""
        for name in sorted((f"{LAUNCH}/{RUN_FILE}", CONFIG_FILE), key=self._changed, reverse=True):
            data = self.content(name)
            if data is None:
                continue
            try:
                table = tomllib.loads(data.decode())
            except (ValueError, RecursionError):
                self.damaged.append(f"{name}: is no TOML (damaged or half written)")
                continue
            train = table.get("train")
            steps = _whole(train.get("steps")) if isinstance(train, dict) else None
            return _text(table.get("name")), steps
        return None, None

    def lives(self) -> tuple[LifeEvent, ...]:
        """Return all events that can be read."""
        name = f"{LAUNCH}/{LIVES_FILE}"
        data = self.content(name)
        if not data:
            return ()
        events: list[LifeEvent] = []
        *lines, torn = data.split(b"\n")
        bad = [number for number, line in enumerate(lines, 1) if not _add_event(line, events)]
        if torn.strip():
            bad.append(len(lines) + 1)
        if bad:
            shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            self.damaged.append(f"{name}: {len(bad)} damaged line(s): {shown}")
        return tuple(events)

    def metrics(self) -> LastMetrics | None:
        """Return the newest training line, read from the end."""
        latest: float | None = None
        for record in self._records_backwards(JOURNAL_FILE):
            step, time = _whole(record.get("step")), _time(record.get("time"))
            # Evaluations and spectra show that the run is alive, but have no loss of training.
            latest = time if latest is None else latest
            if step is None or record.get("kind") != "train":
                continue
            return LastMetrics(
                step=step,
                loss=_number(record.get("loss")),
                tokens_per_second=_number(record.get("tokens_per_second")),
                time=latest,
            )
        return None

    def host(self) -> str | None:
        """Return the host of rank 0 at the newest start."""
        for record in self._records_backwards(ENVIRONMENT_FILE):
            return _text(record.get("host"))
        return None

    def outcome(self) -> Outcome | None:
        """Return how the last start ended."""
        found = self.json_object(OUTCOME_FILE)
        word = _text(found.get("outcome"))
        if word is None:
            if found:
                self.damaged.append(f"{OUTCOME_FILE}: has no outcome")
            return None
        return Outcome(
            outcome=word,
            detail=_text(found.get("detail")) or "",
            reason=_text(found.get("reason")),
            exit_code=_whole(found.get("exit_code")),
        )

    def saved_step(self) -> int | None:
        """Return the step of the newest checkpoint, by the names of the folders."""
        try:
            return next(iter(published(self.folder / CHECKPOINTS)), None)
        except OSError as error:
            self.damaged.append(f"{CHECKPOINTS}: cannot be listed ({error.strerror or error})")
            return None

    def _records_backwards(self, name: str) -> Iterator[dict[str, Any]]:
        num_bad = 0
        try:
            for line in lines_backwards(self.folder / name, TAIL_BYTES):
                record = _json_object(line)
                if record is not None:
                    yield record
                elif not num_bad:
                    num_bad = 1
                    self.damaged.append(f"{name}: has a damaged line near its end")
        except FileNotFoundError:
            return
        except OSError as error:
            self.damaged.append(f"{name}: cannot be read ({error.strerror or error})")

    def _changed(self, name: str) -> float:
        try:
            return (self.folder / name).stat().st_mtime
        except OSError:
            return -math.inf


def _waits_for(sbatch: object) -> tuple[str, ...]:
    """Return the jobs that must end well for a job to start, by its command of sbatch."""
    found: list[str] = []
    for word in sbatch if isinstance(sbatch, list) else ():
        if not isinstance(word, str) or not word.startswith("--dependency="):
            continue
        for condition in word.partition("=")[2].split(","):
            kind, *job_ids = condition.split(":")
            found += job_ids if kind == "afterok" else []
    return tuple(found)


def _add_event(line: bytes, events: list[LifeEvent]) -> bool:
    """Add the event of a line, if it holds one; whether the line is sound."""
    if not line.strip():
        return True
    found = _json_object(line)
    event = _text(found.get("event")) if found else None
    if found is None or event is None:
        return False
    nodes = found.get("nodes")
    events.append(
        LifeEvent(
            event=event,
            time=_time(found.get("time")),
            job_id=_text(found.get("job_id")),
            next_job=_text(found.get("next_job")),
            life=_whole(found.get("life")),
            step=_whole(found.get("step")),
            nodes=tuple(map(str, nodes)) if isinstance(nodes, list) else (),
            detail=_text(found.get("detail")) or "",
        )
    )
    return True


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    """Return a number; the journal writes NaN and infinity as words."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _time(value: object) -> float | None:
    time = _number(value)
    return time if time is not None and math.isfinite(time) else None
