"""What earlier lives of a run tell the one that begins (pure functions of the lines of its log)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.life_log import Record
from launcher.lives import is_newer


@dataclass(frozen=True)
class History:
    """What earlier lives tell the one that begins.

    Attributes:
        life: number of the life that begins, counted from 0 over all jobs of the run.
        num_lives: lives since a person last started or revived the chain, with this one.
        fruitless: failed lives without progress right before this one.
        has_trained: whether a life with the settings of this one has made progress, whoever
            submitted it.
    """

    life: int
    num_lives: int
    fruitless: int
    has_trained: bool = False


def history_of(
    records: Iterable[Record],
    job_id: str,
    *,
    continues: str | None,
    restart_count: int,
    step: int | None,
    settings: str = "",
) -> History:
    """Return what earlier lives of a job, and of the jobs that it continues, tell.

    Args:
        records: all lines of the run.
        job_id: the job whose life begins.
        continues: the job that submitted this one in its place; None for one that a person
            submitted, with which lives are counted anew.
        restart_count: how often SLURM has started this job before.
        step: newest complete checkpoint now.
        settings: what stands for the resolved settings of the life that begins.
    """
    records = list(records)
    num_starts = len({_key(record) for record in records if record["event"] == "started"})
    chain = chain_of(records, job_id, continues)
    given_up = [i for i, record in enumerate(chain) if record["event"] == "gave_up"]
    recent = chain[given_up[-1] + 1 :] if given_up else chain
    lives = _lives(recent)
    return History(
        max(num_starts, restart_count),
        len(lives) + 1,
        _fruitless(lives, step),
        _has_trained(_lives(records), step, settings),
    )


def chain_of(records: Iterable[Record], job_id: str, continues: str | None) -> list[Record]:
    """Return the lines of a job and of those that it continues, oldest first.

    Args:
        records: all lines of the run.
        job_id: the job.
        continues: the job that submitted this one in its place, if one did.
    """
    records = list(records)
    before = {
        record.get("job_id"): record.get("continues")
        for record in records
        if record["event"] == "started"
    }
    jobs = {job_id}
    previous = continues or before.get(job_id)
    while previous is not None and previous not in jobs:
        jobs.add(previous)
        previous = before.get(previous)
    return [record for record in records if record.get("job_id") in jobs]


def bad_nodes_of(chain: Iterable[Record]) -> tuple[str, ...]:
    """Return the nodes that a pre-flight of these lives has found bad."""
    found: dict[str, None] = {}
    for record in chain:
        nodes = record.get("exclude") if record["event"] == "preflight" else None
        found |= dict.fromkeys(map(str, nodes if isinstance(nodes, list) else []))
    return tuple(found)


@dataclass
class _Life:
    key: tuple[object, object]
    step: int | None
    settings: object
    counts: bool = True
    is_over: bool = False


def _lives(chain: Iterable[Record]) -> list[_Life]:
    found: list[_Life] = []
    for record in chain:
        event, key = record["event"], _key(record)
        if event == "started":
            if found and found[-1].key == key:
                continue  # written twice: the first time, the disk said that it had failed
            step, settings = record.get("step"), record.get("settings")
            found.append(_Life(key, step if isinstance(step, int) else None, settings))
        elif not found or found[-1].key != key:
            continue
        elif event == "ended":
            found[-1].counts = record.get("counts") is not False
            found[-1].is_over = True
        elif event == "warned" and record.get("signal") == "SIGTERM":
            # SLURM took the job away; a life that vanishes after that has not failed.
            found[-1].counts = found[-1].counts and found[-1].is_over
    return found


def _key(record: Record) -> tuple[object, object]:
    return record.get("job_id"), record.get("life")


def _has_trained(lives: Sequence[_Life], step: int | None, settings: str) -> bool:
    """Whether a life with these settings was followed by a newer checkpoint."""
    later = [*(life.step for life in lives[1:]), step]
    pairs = zip(lives, later, strict=False)  # without lives there is one step too many
    return any(life.settings == settings and is_newer(after, life.step) for life, after in pairs)


def _fruitless(lives: Sequence[_Life], step: int | None) -> int:
    """Count failed lives from the newest back to the last one that made progress."""
    count, later = 0, step
    for life in reversed(lives):
        if is_newer(later, life.step):
            break
        count += int(life.counts)
        later = life.step
    return count
