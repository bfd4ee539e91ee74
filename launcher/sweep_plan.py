"""What is to be done with every point of a sweep: checked, compared with what is there, decided."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.launch_error import LaunchError
from launcher.launch_folder import LaunchFolder
from launcher.plan_check import load_run
from launcher.planned_point import Action, PlannedPoint
from launcher.run_folder import RunRecord
from launcher.run_reader import read_run
from launcher.run_state import RunState
from launcher.saved_run import refuse_finished
from launcher.slurm_queue import SlurmQueue
from launcher.status import state_of
from launcher.submission import Request, Submission, prepare
from launcher.sweep_children import follow_parents, refuse_waiting_strangers
from launcher.sweep_points import Point
from mpotrain.config_file import leaves
from mpotrain.errors import ConfigError, MpotrainError
from mpotrain.layered_toml import OVERRIDE_SOURCE

MAX_NAMED = 3
"""Points that are named behind a problem that several have."""


def plan_sweep(
    points: Sequence[Point],
    cluster_file: Path,
    overrides: Sequence[str],
    queue: SlurmQueue,
    *,
    update: bool,
) -> list[PlannedPoint]:
    """Check all points, and find those that need a job.

    Args:
        points: the points.
        cluster_file: the cluster file.
        overrides: further `dotted.key=value` lines for all.
        queue: of the cluster.
        update: allow settings of runs that were begun to change.

    Raises:
        ConfigError: some points cannot run, or their run folders hold other runs; the problems of
            all points at once.
        LaunchError: the queue does not say whether jobs are still there, or cannot let a run wait
            for another one; or a run has begun already behind one that is to be submitted.
    """
    _refuse_collisions(points, overrides)
    submissions = check_points(points, cluster_file, overrides)
    records = [read_run(submission.folder) for submission in submissions]
    answer = queue.jobs(job_id for record in records for job_id in record.job_ids)
    planned = []
    for point, submission, record in zip(points, submissions, records, strict=True):
        state = state_of(record, answer)
        action = _action(submission, record, state)
        job_id = state.job.job_id if state.job is not None else None
        changed = changed_settings(submission)
        planned.append(PlannedPoint(point, submission, action, state, job_id, changed))
    _refuse_unknown(planned)
    if update:
        _refuse_changed_jobs(planned)
    else:
        _refuse_changed(planned)
    planned = follow_parents(planned, records)
    _refuse_stopped(planned, records)
    _refuse_parents_outside(planned)
    refuse_waiting_strangers(planned, queue)
    return planned


def notes_of(planned: Sequence[PlannedPoint]) -> list[str]:
    """Return what the plans of the runs to be submitted note, each note once, with its runs.

    Args:
        planned: all points of the sweep.
    """
    names: dict[str, list[str]] = {}
    wanted = [one for one in planned if one.action == "submit"]
    for one in wanted:
        for note in dict.fromkeys(one.submission.plan.notes):
            names.setdefault(note, []).append(one.point.name)
    return [f"{note} ({_among(found, len(wanted))})" for note, found in names.items()]


def check_points(
    points: Sequence[Point],
    cluster_file: Path,
    overrides: Sequence[str],
    prepare: Callable[[Request], Submission] = prepare,
) -> list[Submission]:
    """Resolve and weigh every point.

    Args:
        points: the points.
        cluster_file: the cluster file.
        overrides: further `dotted.key=value` lines for all.
        prepare: checks one run.

    Raises:
        ConfigError: with the problems of all points; what several have in common stands once.
    """
    found: list[Submission] = []
    problems: dict[str, list[str]] = {}
    for point in points:
        request = Request(
            run_file=point.run_file,
            cluster_file=cluster_file,
            overrides=(*point.overrides, *overrides),
            task=point.task,
        )
        try:
            found.append(prepare(request))
        except ConfigError as error:
            for problem in error.problems:
                located = _located(problem, point, overrides)
                problems.setdefault(located, []).append(point.name)
        except MpotrainError as error:
            problems.setdefault(str(error), []).append(point.name)
    if problems:
        raise ConfigError(
            [f"{problem} ({_among(names, len(points))})" for problem, names in problems.items()]
        )
    return found


def _located(problem: str, point: Point, overrides: Sequence[str]) -> str:
    """Return a problem of a point with the place in the sweep file where its setting stands.

    Settings of a sweep are laid over the run file as if they were given on the command line.

    Args:
        problem: `origin: dotted.key: text`, where words may stand before the key.
        point: the point.
        overrides: what was really given on the command line.
    """
    origin, *parts = problem.split(": ")
    if origin not in (OVERRIDE_SOURCE, str(point.run_file)):
        return problem
    # What the run file itself is blamed for is the sweep's only where it sets that very key.
    matches = _overlap if origin == OVERRIDE_SOURCE else _is_inside
    given = [override.partition("=")[0].strip() for override in overrides]
    for index, key in enumerate(parts[:2]):
        place = next((at for other, at in point.origins.items() if matches(key, other)), None)
        if place is not None and not any(matches(key, other) for other in given):
            return ": ".join([f"{place}.{key}", *parts[:index], *parts[index + 1 :]])
    return problem


def _refuse_collisions(points: Sequence[Point], overrides: Sequence[str]) -> None:
    """Refuse settings for all runs that would make different runs equal.

    Raises:
        ConfigError: with all of them.
    """
    found = []
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key in ("name", "folder"):
            found.append(f"{key}: every run of a sweep has its own; set it in the sweep file")
        elif varied := sorted(other for other in _varied(points) if _overlap(key, other)):
            found.append(f"{key}: the sweep varies {', '.join(varied)}; leave it out here")
    if found:
        raise ConfigError([f"command line: {problem}" for problem in found])


def _varied(points: Sequence[Point]) -> set[str]:
    """Return the settings that are not the same in all points."""
    values: dict[str, set[str]] = {}
    for key in {key for point in points for key in point.settings}:
        values[key] = {repr(point.settings.get(key)) for point in points}
    return {key for key, found in values.items() if len(found) > 1}


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys set the same, or one of them a part of the other."""
    return _is_inside(one, other) or _is_inside(other, one)


def _is_inside(key: str, table: str) -> bool:
    """Whether a dotted key is that of a table, or of something in it."""
    return f"{key}.".startswith(f"{table}.")


def changed_settings(submission: Submission) -> tuple[str, ...]:
    """Return the settings that the run folder was last submitted with and that are now others.

    Settings that are new in this version have their defaults in both.

    Args:
        submission: the job.
    """
    try:
        run = load_run(LaunchFolder(submission.folder).run_file, submission.task, ())
    except (MpotrainError, OSError):
        return ()  # never submitted, or by a version with other settings
    old, new = leaves(run), leaves(submission.run)
    return tuple(
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in dict.fromkeys([*new, *old])
        if old.get(key) != new.get(key) and key not in ("name", "folder")
    )


def _action(submission: Submission, record: RunRecord, state: RunState) -> Action:
    if state.job is not None or state.word == "running":
        return "queued"
    if record.outcome is None or not record.outcome.is_final:
        return "submit"
    try:
        refuse_finished(submission.run, submission.folder)
    except LaunchError:
        return "finished"
    return "submit"  # more steps than it has done, or its last checkpoint is damaged


def _refuse_unknown(planned: Sequence[PlannedPoint]) -> None:
    for word, advice in (("unknown", "try again later"), ("damaged", "mend or delete its files")):
        found = [one for one in planned if one.action == "submit" and one.state.word == word]
        if found:
            raise LaunchError(
                f"cannot tell whether {len(found)} of {len(planned)} runs still have a job, the "
                f"first is {found[0].submission.folder}: {found[0].state.detail}; {advice}"
            )


def _refuse_changed(planned: Sequence[PlannedPoint]) -> None:
    changed = [one for one in planned if one.changed]
    if changed:
        raise ConfigError(
            [
                f"{one.submission.folder}: was submitted with other settings "
                f"({'; '.join(one.changed[:5])}); put what differs into `name`, use another "
                "`folder`, or allow it with --update"
                for one in changed
            ]
        )


def _refuse_changed_jobs(planned: Sequence[PlannedPoint]) -> None:
    changed = [one for one in planned if one.changed and one.action == "queued"]
    if changed:
        raise ConfigError(
            [
                f"{one.submission.folder}: is {one.state.word} with other settings "
                f"({'; '.join(one.changed[:5])}), which it would keep; take it out of the queue or "
                f"let it stop first (python -m launcher cancel {_quoted(one)}), and give the same "
                "command again"
                for one in changed
            ]
        )


def _refuse_parents_outside(planned: Sequence[PlannedPoint]) -> None:
    """Refuse runs that would start beside the ones that they are to follow.

    Raises:
        LaunchError: with the first of them.
    """
    outside = {
        one.point.folder: one for one in planned if one.action == "queued" and not one.job_id
    }
    found = [
        (one, outside[parent])
        for one in planned
        if one.action == "submit"
        for parent in one.point.parents
        if parent in outside
    ]
    if found:
        child, parent = found[0]
        raise LaunchError(
            f"{child.submission.folder}: must wait for {parent.submission.folder}, which is "
            f"{parent.state.word} outside of the queue, where no job can wait for it"
            f"{f' ({len(found) - 1} more like that)' if len(found) > 1 else ''}; wait for its end, "
            f"or let it stop (python -m launcher stop {_quoted(parent)}), and give the same "
            "command again"
        )


def _refuse_stopped(planned: Sequence[PlannedPoint], records: Sequence[RunRecord]) -> None:
    stopped = [
        one.submission.folder
        for one, record in zip(planned, records, strict=True)
        if one.action == "submit" and record.stop_requested
    ]
    if stopped:
        raise LaunchError(
            f"the stop file is in {len(stopped)} of {len(planned)} run folders, where a job would "
            "stop at once; take it back: python -m launcher stop --undo "
            f"{shlex.quote(str(stopped[0]))}"
        )


def _quoted(one: PlannedPoint) -> str:
    return shlex.quote(str(one.submission.folder))


def _among(names: Sequence[str], total: int) -> str:
    if len(names) == total and total > 1:
        return f"in all {total} runs"
    shown = ", ".join(names[:MAX_NAMED])
    return f"in {shown}" + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
