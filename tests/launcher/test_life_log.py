"""The memory of a run over its lives: lines, chains of jobs, checkpoints, the outcome file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.life_history import bad_nodes_of, chain_of, history_of
from launcher.life_log import LifeLog, forget_outcome, newest_step, read_outcome
from mpotrain.checkpoint.manifest import Manifest, RngRule, RunState, fingerprint
from mpotrain.checkpoint.manifest_file import encode_manifest
from mpotrain.errors import StorageError


def checkpoint(folder: Path, step: int) -> Path:
    """Write a checkpoint without tensors."""
    state = RunState(
        step=step,
        consumed_samples=step,
        num_updates=step,
        config={},
        data_fingerprint=None,
        rng=RngRule(seed=0, rule=""),
        engine={},
        train_state={},
    )
    manifest = Manifest(
        format=1, run=state, versions={}, fingerprint=fingerprint({}), tensors={}, files={}
    )
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_bytes(encode_manifest(manifest))
    return path


def started(job_id: str, life: int, step: int | None, **more: Any) -> dict[str, Any]:
    return {"event": "started", "job_id": job_id, "life": life, "step": step, **more}


def ended(job_id: str, life: int, *, counts: bool = True) -> dict[str, Any]:
    return {"event": "ended", "job_id": job_id, "life": life, "counts": counts}


def lives(*steps: int | None, counts: bool = True) -> list[dict[str, Any]]:
    """Lives of job 7 that began at these steps and failed."""
    return [
        record
        for life, step in enumerate(steps)
        for record in (started("7", life, step), ended("7", life, counts=counts))
    ]


def fruitless(records: list[dict[str, Any]], step: int | None) -> int:
    return history_of(records, "7", continues=None, restart_count=0, step=step).fruitless


def test_appends_and_reads_lines(tmp_path: Path) -> None:
    log = LifeLog(tmp_path)
    assert log.records() == []
    log.append("started", job_id="7", life=0, nodes=("a", "b"), more={"continues": "6"})
    log.append("ended", job_id="7", life=0, step=5, detail='a "quote"\nand a line')
    first, second = log.records()
    assert (first["event"], first["nodes"], first["continues"]) == ("started", ["a", "b"], "6")
    assert (second["step"], second["detail"]) == (5, 'a "quote"\nand a line')
    assert len((tmp_path / "launch/lives.jsonl").read_text().splitlines()) == 2


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    log = LifeLog(tmp_path)
    log.append("started", job_id="7", life=0)
    with log.path.open("ab") as file:
        file.write(b'{"event": "ended", "job')
    log.append("started", job_id="7", life=1)
    assert [record["life"] for record in log.records()] == [0, 1]


def test_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    log = LifeLog(tmp_path)
    log.append("started", job_id="7", life=0)
    with log.path.open("ab") as file:
        file.write(b'[1]\n\xff\xfe\n{"event": 3}\n\n' + b"[" * 100_000 + b"\n")
    assert len(log.records()) == 1


def test_a_folder_that_cannot_be_written_is_an_error_for_people(tmp_path: Path) -> None:
    (tmp_path / "launch").write_text("a file in the way")
    with pytest.raises(StorageError, match=r"lives\.jsonl"):
        LifeLog(tmp_path).append("started", job_id="7", life=0)


def test_counts_failed_lives_back_to_the_last_progress() -> None:
    assert fruitless([], None) == 0
    assert fruitless(lives(None), None) == 1
    assert fruitless(lives(None, None), None) == 2
    assert fruitless(lives(None, None), 5) == 0
    assert fruitless(lives(None, 5, 5), 5) == 2
    assert fruitless(lives(5, 5, 9), 9) == 1
    assert fruitless(lives(5, 5, 9), 10) == 0


def test_lives_that_were_cut_short_neither_count_nor_reset() -> None:
    records = [*lives(5, 5), started("7", 2, 5), ended("7", 2, counts=False)]
    assert fruitless(records, 5) == 2


def test_a_life_that_vanished_counts_unless_slurm_took_it() -> None:
    vanished = [started("7", 0, 5)]
    taken = {"event": "warned", "job_id": "7", "life": 0, "signal": "SIGTERM"}
    warned = {"event": "warned", "job_id": "7", "life": 0, "signal": "SIGUSR1"}
    assert fruitless(vanished, 5) == 1
    assert fruitless([*vanished, warned], 5) == 1
    assert fruitless([*vanished, taken], 5) == 0


def has_trained(records: list[dict[str, Any]], step: int | None, settings: str = "a") -> bool:
    found = history_of(records, "9", continues=None, restart_count=0, step=step, settings=settings)
    return found.has_trained


def test_a_life_has_trained_where_a_newer_checkpoint_followed() -> None:
    records = [
        started("7", 0, None, settings="a"),
        {"event": "gave_up", "job_id": "7", "life": 0},
        started("8", 1, 5, settings="b"),
    ]
    # Whoever submitted them, and whatever was given up since.
    assert has_trained(records, 5)
    assert not has_trained(records, 5, "b")
    assert has_trained(records, 6, "b")
    assert not has_trained(records, 6, "c")
    assert not has_trained([started("7", 0, None)], 5)  # of an earlier version: not known
    assert not has_trained([], 5)


def test_events_of_a_life_that_was_not_started_change_no_other() -> None:
    assert fruitless([started("7", 0, 5), ended("7", 1, counts=False)], 5) == 1


def test_giving_up_begins_a_new_count_but_not_new_numbers() -> None:
    records = [*lives(5, 5, 5), {"event": "gave_up", "job_id": "7", "life": 2}]
    history = history_of(records, "7", continues=None, restart_count=0, step=5)
    assert (history.life, history.num_lives, history.fruitless) == (3, 1, 0)


def test_the_restart_count_of_slurm_is_believed_where_lines_are_missing() -> None:
    assert history_of([], "7", continues=None, restart_count=4, step=None).life == 4
    assert history_of(lives(1, 2), "7", continues=None, restart_count=1, step=3).life == 2


def test_a_chain_of_jobs_is_one_history() -> None:
    records = [
        *lives(5),
        started("8", 1, 5, continues="7"),
        ended("8", 1),
        started("99", 2, 5),
        ended("99", 2),
    ]
    history = history_of(records, "9", continues="8", restart_count=0, step=5)
    # Lives are numbered over all jobs of the run, but only those of the chain count.
    assert (history.life, history.num_lives, history.fruitless) == (3, 3, 2)
    # Its later lives find the chain in the lines, since SLURM repeats the command line.
    again = [*records, started("9", 3, 5, continues="8"), ended("9", 3)]
    assert history_of(again, "9", continues="8", restart_count=1, step=5).fruitless == 3
    assert [record["job_id"] for record in chain_of(records, "8", None)] == ["7", "7", "8", "8"]


def test_a_job_that_a_person_submits_starts_a_new_count() -> None:
    history = history_of(lives(5, 5, 5), "8", continues=None, restart_count=0, step=5)
    assert (history.num_lives, history.fruitless) == (1, 0)


def test_a_circle_of_jobs_ends() -> None:
    records = [started("7", 0, 1, continues="8"), started("8", 1, 1, continues="7")]
    assert len(chain_of(records, "7", None)) == 2


def test_bad_nodes_of_earlier_checks_are_remembered() -> None:
    records = [
        {"event": "preflight", "exclude": ["n2"]},
        {"event": "preflight", "exclude": ["n3", "n2"]},
        {"event": "resubmitted", "exclude": ["n9"]},
    ]
    assert bad_nodes_of(records) == ("n2", "n3")


def test_newest_step_is_that_of_a_complete_checkpoint(tmp_path: Path) -> None:
    assert newest_step(tmp_path) is None
    folder = tmp_path / "checkpoints"
    checkpoint(folder, 10)
    checkpoint(folder, 20)
    assert newest_step(tmp_path) == 20
    checkpoint(folder, 30).rename(folder / "step-00000030.tmp-0123abcd")
    assert newest_step(tmp_path) == 20
    damaged = checkpoint(folder, 40) / "manifest.json"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (folder / "step-00000050").mkdir()
    assert newest_step(tmp_path) == 20


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"outcome": 3}', b"\xff", b"[" * 100_000], ids=range(6)
)
def test_an_outcome_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "outcome.json").write_bytes(content)
    assert read_outcome(tmp_path) is None


def test_reads_the_outcome(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    full = {"outcome": "failed", "detail": "x", "reason": "HUNG", "exit_code": 86, "step": 4}
    (tmp_path / "outcome.json").write_text(json.dumps(full | {"retry": False}))
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert (outcome.reason, outcome.exit_code, outcome.step) == ("HUNG", 86, 4)
    assert outcome.retry is False
    # Written by an earlier version.
    (tmp_path / "outcome.json").write_text('{"outcome": "resume", "detail": "step 4"}')
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert (outcome.retry, outcome.reason) == (True, None)
    forget_outcome(tmp_path)
    forget_outcome(tmp_path)
    assert read_outcome(tmp_path) is None
