"""`status`: what run folders and the queue say, whatever state they are in."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slurm_commands_fake import FakeSlurm, job, make_run, train_line, write_lines

from launcher import status
from launcher.file_ends import BLOCK_BYTES, lines_backwards, offset_of_last_lines
from launcher.find_runs import find_runs, named_run
from launcher.run_folder import RunRecord
from launcher.run_reader import read_run
from launcher.slurm_queue import QueueAnswer, SlurmQueue
from launcher.table import table
from launcher.writer_lock import is_written
from mpotrain.errors import ConfigError


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def started(job_id: str, life: int, time: float = 1500.0, **more: Any) -> dict[str, Any]:
    entry = {"time": time, "job_id": job_id, "life": life, "event": "started", "step": None}
    return {**entry, "nodes": ["n1", "n2"], "detail": "", **more}


def states(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    assert status.main(parser.parse_args([str(root), "--json"])) == 0
    return {Path(entry["folder"]).name: entry for entry in json.loads(capsys.readouterr().out)}


def test_all_runs_with_one_question_to_the_queue(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    lives = [started("11", 0), started("11", 1, nodes=["n3", "n4"])]
    make_run(root / "a", job_id="11", lives=lives, metrics=[train_line(40), train_line(60)])
    make_run(root / "deep" / "b", job_id="12")
    make_run(root / "c", job_id="13", outcome={"outcome": "done", "detail": "step 100"})
    make_run(root / "d", job_id="14", outcome={"outcome": "failed", "detail": "boom"})
    make_run(root / "e", job_id="15", outcome={"outcome": "resume", "reason": "SIGUSR1"})
    make_run(root / "f", job_id="16", lives=[started("16", 0)])
    make_run(root / "g", job_id="17_3")
    make_run(root / "h", job_id="18", lives=[started("18", 0)])
    slurm.add("11", "RUNNING", nodes="n[3-4]")
    slurm.add("12", "PENDING", reason="Priority")
    slurm.add("17_3", "PENDING", raw="21", reason="Dependency")
    slurm.add("18", "NODE_FAIL")
    make_run(root / "i", job_id="19")
    slurm.add("19", "CANCELLED")
    found = states(root, capsys)
    assert {name: entry["state"] for name, entry in found.items()} == {
        "a": "running", "b": "queued", "c": "done", "d": "failed", "e": "stopped", "f": "lost",
        "g": "queued", "h": "lost", "i": "cancelled",
    }  # fmt: skip
    assert (found["a"]["step"], found["a"]["num_steps"], found["a"]["restarts"]) == (60, 100, 1)
    assert found["a"]["loss"] == pytest.approx(4.4)
    assert found["a"]["nodes"] == ["n3", "n4"]
    assert found["a"]["updated"] == 2060.0
    assert found["e"]["reason"] == "SIGUSR1"
    assert "NODE_FAIL, and it left no word" in found["h"]["detail"]
    assert "it never started" in found["i"]["detail"]
    (call,) = slurm.calls("squeue")
    assert "--jobs=11,12,13,14,15,16,17_3,18,19" in call


def test_the_table_shows_what_json_says(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    now = time.time()
    metrics = [train_line(60, time=now - 65, tokens_per_second=1.5e6)]
    make_run(root / "a", job_id="11", lives=[started("11", 0)], metrics=metrics)
    (root / "a" / "stop").touch()
    make_run(root / "b", job_id="12", lives=[{"event": "gave_up", "detail": "3 lives for nothing"}])
    slurm.add("11", "RUNNING", nodes="n[1-2]")
    status.main(argparse.Namespace(folders=[root], json=False, watch=None))
    heading, first, second, note = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["run", "state", "job"]
    for part in ("running, stop asked for", "60/100", "4.4000", "1.5M", "1m", "n[1-2]"):
        assert part in first
    assert "gave up" in second
    assert "3 lives for nothing" in note


@pytest.mark.parametrize("trouble", ["slurm_load_jobs error: Unable to contact", "hang"])
def test_a_queue_without_an_answer_makes_states_unknown(
    tmp_path: Path, slurm: FakeSlurm, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.slurm_queue.TIMEOUT_SECONDS", 0.3)
    slurm.set(trouble={"squeue": trouble})
    folders = [
        make_run(tmp_path / "a", job_id="11", lives=[started("11", 0)]),
        make_run(tmp_path / "b", job_id="12", outcome={"outcome": "resume", "reason": "SIGUSR1"}),
        make_run(tmp_path / "c", job_id="13", outcome={"outcome": "done"}),
        make_run(
            tmp_path / "d",
            job_id="14",
            outcome={"outcome": "done"},
            lives=[{"event": "done"}, {"event": "submitted", "job_id": "14"}],
        ),
    ]
    begun = time.monotonic()
    found, _ = status.gather(folders, SlurmQueue(0.3))
    assert time.monotonic() - begun < 40
    words = [state.word for _, state in found]
    assert words == ["unknown", "unknown", "done", "unknown"]
    assert "squeue" in found[0][1].detail
    assert "SIGUSR1" in found[1][1].detail


@pytest.mark.usefixtures("no_slurm")
def test_without_slurm_files_decide(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "a", job_id="11", lives=[started("11", 0)]),
        make_run(tmp_path / "b", outcome={"outcome": "failed", "detail": "boom"}),
        make_run(tmp_path / "c"),
    ]
    words = [state.word for _, state in status.gather(folders, SlurmQueue())[0]]
    assert words == ["unknown", "failed", "new"]


def test_variables_that_filter_squeue_are_taken_away(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin" / "squeue").unlink()
    script = tmp_path / "bin" / "squeue"
    script.write_text('#!/bin/sh\nenv >"$0.env"\n')
    script.chmod(0o755)
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    assert SlurmQueue().jobs(["11"]).known
    assert "SQUEUE_PARTITION" not in Path(f"{script}.env").read_text()
    del slurm


def test_forgotten_jobs_are_an_answer_and_malformed_ids_are_not_asked(slurm: FakeSlurm) -> None:
    answer = SlurmQueue().jobs(["7"])
    assert answer.known
    assert not answer.jobs
    assert SlurmQueue().jobs(["7; rm -rf /", "--help", ""]) == QueueAnswer()
    assert len(slurm.calls("squeue")) == 1


def test_array_tasks_are_found_under_both_ids(slurm: FakeSlurm) -> None:
    slurm.add("30_2", "RUNNING", raw="33", name="a|b|c", nodes="n1")
    jobs = SlurmQueue().jobs(["33", "30_2"]).jobs
    assert jobs["33"] == jobs["30_2"]
    assert (jobs["33"].job_id, jobs["33"].name, jobs["33"].nodes) == ("30_2", "a|b|c", "n1")


def test_dependents_are_followed_through_arrays_and_chains(slurm: FakeSlurm) -> None:
    slurm.add("10", "RUNNING")
    slurm.add("11", "PENDING", dependency="afterok:10(unfulfilled)")
    slurm.add("12", "PENDING", dependency="afterany:9(unfulfilled),afterok:11(unfulfilled)")
    slurm.add("13", "PENDING", dependency="afterok:100(unfulfilled)")
    slurm.add("20_0", "RUNNING")
    slurm.add("21", "PENDING", dependency="afterok:20_*(unfulfilled)")
    slurm.add("22", "PENDING", dependency="afterok:20_1(unfulfilled)")
    for task in "01":
        slurm.add(f"23_{task}", "PENDING", dependency="aftercorr:20_*(unfulfilled)")
    assert SlurmQueue().dependents(["10"]) == ["11", "12"]
    assert SlurmQueue().dependents(["20_0"]) == ["21", "23_0"]


def test_a_live_process_without_a_job_is_seen_by_its_lock(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints").mkdir()
    lock = run / "checkpoints" / ".writer"
    lock.touch()
    (run / "environment.jsonl").write_text(json.dumps({"host": os.uname().nodename}) + "\n")
    assert is_written(tmp_path) is None
    assert is_written(run / "checkpoints") is False
    assert status.gather([run], SlurmQueue())[0][0][1].word == "interrupted"
    # Locks of one's own process do not count: another one has to hold it.
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert is_written(run / "checkpoints") is True
        assert status.gather([run], SlurmQueue())[0][0][1].word == "running"
        assert holder.stdin is not None
        holder.stdin.close()
    # Asking has not taken the lock.
    with lock.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    del slurm


def test_damaged_files_are_named_and_the_rest_is_shown(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "a", metrics=[train_line(10)])
    (run / "outcome.json").write_text('{"outcome": "do')
    (run / "launch" / "submission.json").write_bytes(b"\xff\x00")
    (run / "config.toml").write_text('name = "other"\n[train]\nsteps = 50\n')
    os.utime(run / "config.toml", (0, 0))
    (run / "launch" / "run.toml").write_text("name = ")
    (run / "launch" / "lives.jsonl").write_text('{"event": "started"}\nnonsense\n[1]\n{"time"')
    with (run / "metrics.jsonl").open("a") as file:
        file.write("garbage\n" + '{"step": 11, "kind": "tra')
    record = read_run(run)
    assert (record.name, record.num_steps, record.num_starts) == ("other", 50, 1)
    assert record.metrics is not None
    assert record.metrics.step == 10
    named = " ".join(record.damaged)
    for file_name in ("outcome.json", "submission.json", "run.toml", "lives.jsonl: 3", "metrics"):
        assert file_name in named
    assert status.main(argparse.Namespace(folders=[tmp_path], json=False, watch=None)) == 0
    assert "outcome.json: is no JSON object" in capsys.readouterr().out
    del slurm


FILES = ["outcome.json", "launch/submission.json", "launch/lives.jsonl", "launch/run.toml",
         "config.toml", "metrics.jsonl", "environment.jsonl"]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = ["outcome", "event", "job_id", "nodes", "time", "step", "loss", "kind", "host", "reason"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    contents=st.dictionaries(
        st.sampled_from(FILES),
        st.binary(max_size=60)
        | st.dictionaries(st.sampled_from(KEYS), JSON).map(
            lambda d: json.dumps(d).encode() + b"\n"
        ),
    )
)
def test_no_content_of_any_file_can_break_it(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]
) -> None:
    run = tmp_path_factory.mktemp("hostile")
    (run / "launch").mkdir()
    for name, content in contents.items():
        (run / name).write_bytes(content)
    record = read_run(run)
    state = status.state_of(record, QueueAnswer())
    json.dumps(status.as_json(record, state), allow_nan=False)
    cells = status.row(record, state, time.time())
    assert "\n" not in table(status.HEADINGS, [cells]).partition("\n")[2]


def test_folders_in_place_of_files_and_unreadable_ones_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "outcome.json").mkdir()
    (run / "metrics.jsonl").mkdir()
    assert len(read_run(run).damaged) == 2


def test_metrics_are_read_from_their_tail(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("wb") as file:
        file.seek(3 << 30)  # three sparse gigabytes before the first line that counts
        file.write(b"\n" + json.dumps(train_line(7, loss="nan")).encode() + b"\n")
        wide = {"step": 7, "kind": "spectra", "time": 9000.0, "values": [0.125] * 60_000}
        file.write(json.dumps(wide).encode() + b"\n")
    me = psutil.Process()
    before = me.io_counters().read_chars
    record = read_run(run)
    assert me.io_counters().read_chars - before < 16 << 20
    assert record.metrics is not None
    assert record.metrics.step == 7
    assert record.metrics.loss != record.metrics.loss  # NaN
    assert record.metrics.time == 9000.0


@given(
    lines=st.lists(st.binary(max_size=40).filter(lambda b: b"\n" not in b), max_size=30),
    torn=st.binary(max_size=10).filter(lambda b: b"\n" not in b),
    block=st.integers(1, 50),
    count=st.integers(0, 8),
)
@settings(max_examples=150, deadline=None)
def test_ends_of_files_against_splitting_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    torn: bytes,
    block: int,
    count: int,
) -> None:
    path = tmp_path_factory.mktemp("ends") / "file"
    content = b"".join(line + b"\n" for line in lines) + torn
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.file_ends.BLOCK_BYTES", block)
        assert list(lines_backwards(path, 1 << 30)) == lines[::-1]
        offset = offset_of_last_lines(path, count)
    split = [line + b"\n" for line in lines] + ([torn] if torn else [])
    assert content[offset:] == b"".join(split[max(0, len(split) - count) :])


def test_reading_back_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"".join(b"%06d\n" % n for n in range(100_000)))
    last = list(lines_backwards(path, 3 * BLOCK_BYTES))
    assert last[0] == b"099999"
    assert len(last) < 3 * BLOCK_BYTES // 7 + 1
    assert len(set(last)) == len(last)


def test_search_is_safe_with_links_and_bounded(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make_run(root / "a")
    make_run(root / "a" / "checkpoints" / "inner")
    make_run(tmp_path / "elsewhere")
    make_run(root / ".hidden" / "b")
    (root / "loop").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "twice").symlink_to(root / "a")
    (root / "dangling").symlink_to(tmp_path / "nothing")
    make_run(tmp_path / "tree" / "inside")
    (root / "to_tree").symlink_to(tmp_path / "tree")
    (root / "plain").mkdir()
    (root / "plain" / "config.toml").touch()
    assert [path.name for path in find_runs([root, root / "a"]).folders] == ["a", "linked", "plain"]
    deep = root / "1" / "2" / "3"
    make_run(deep)
    assert deep not in find_runs([root], max_depth=2).folders
    assert deep in find_runs([root], max_depth=3).folders
    assert "stopped after 2" in find_runs([root], max_folders=2).notes[0]
    with pytest.raises(ConfigError, match="does not exist"):
        find_runs([tmp_path / "nowhere"])


def test_a_run_is_named_by_folder_or_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a")
    file = tmp_path / "a.toml"
    file.write_text(f"folder = {json.dumps(str(run))}\n")
    assert named_run(run) == run
    assert named_run(file) == run
    with pytest.raises(ConfigError, match="holds 1, the first is"):
        named_run(tmp_path / "runs")
    file.write_text('folder = "nowhere"\n')
    for path in (file, tmp_path / "nothing", tmp_path / "bin"):
        with pytest.raises(ConfigError, match=r"no run yet|does not exist"):
            named_run(path)


def test_watch_looks_again_until_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    assert status.watch(lambda: "look\n", 5.0, sleep) == 0
    assert capsys.readouterr().out == "look\n" * 3
    assert waited == [5.0] * 3


def test_records_of_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert read_run(empty) == RunRecord(folder=empty, name="empty")
    assert job("1", "PENDING")["raw"] == "1"
    write_lines(empty / "x", [])
