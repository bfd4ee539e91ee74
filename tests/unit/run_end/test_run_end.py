"""The record of how a start ended: what is in it, who may write it, and when it is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpotrain.errors import (
    EXIT_ANOMALY,
    EXIT_BAD_INPUT,
    EXIT_CRASH,
    EXIT_HUNG,
    EXIT_STORAGE,
    LostRankError,
    ParallelError,
)
from mpotrain.launch import is_lost_peer
from mpotrain.run_end import FAILED, HUNG, EndRecord, RunEnd, read_outcome

REPOSITORY = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from mpotrain.checkpoint.lock import FolderLock
FolderLock(Path(sys.argv[1])).acquire()
print("locked", flush=True)
time.sleep(300)
"""


def failed(exit_code: int = EXIT_BAD_INPUT) -> RunEnd:
    return RunEnd(outcome=FAILED, detail="why", exit_code=exit_code)


def record(folder: Path) -> EndRecord:
    return EndRecord(folder, folder / "checkpoints")


def test_what_a_batch_script_reads(tmp_path: Path) -> None:
    end = RunEnd(outcome=FAILED, detail="stuck", exit_code=EXIT_HUNG, reason=HUNG, step=12)
    record(tmp_path / "run").write(end, begun=True)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text()) == {
        "outcome": "failed",
        "detail": "stuck",
        "reason": "HUNG",
        "exit_code": 86,
        "step": 12,
        "retry": True,
    }


@pytest.mark.parametrize(
    ("outcome", "exit_code", "retry"),
    [
        ("done", 0, False),
        ("held", 0, False),
        ("resume", 85, True),
        ("resume", EXIT_CRASH, True),
        (FAILED, EXIT_CRASH, True),
        (FAILED, EXIT_BAD_INPUT, False),
        (FAILED, EXIT_ANOMALY, False),
        (FAILED, EXIT_STORAGE, True),
        (FAILED, EXIT_HUNG, True),
    ],
)
def test_whether_another_start_may_help(outcome: str, exit_code: int, retry: bool) -> None:
    assert RunEnd(outcome=outcome, detail="", exit_code=exit_code).retry is retry


def test_the_first_end_counts(tmp_path: Path) -> None:
    one = record(tmp_path)
    one.write(RunEnd(outcome="done", detail="", exit_code=0), begun=True)
    one.write(failed(), begun=True)
    assert (read_outcome(tmp_path) or {})["outcome"] == "done"


def test_a_refusal_is_on_record_in_a_run_folder_that_is_there(tmp_path: Path) -> None:
    record(tmp_path / "none").write(failed(), begun=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "checkpoints").mkdir()
    for before in (None, "resume", FAILED):
        if before is not None:
            (tmp_path / "outcome.json").write_text(json.dumps({"outcome": before}))
        record(tmp_path).write(failed(), begun=False)
        assert (read_outcome(tmp_path) or {})["exit_code"] == EXIT_BAD_INPUT


@pytest.mark.parametrize("before", ["done", "held"])
def test_a_refusal_leaves_a_finished_run_alone(tmp_path: Path, before: str) -> None:
    (tmp_path / "outcome.json").write_text(json.dumps({"outcome": before}))
    record(tmp_path).write(failed(), begun=False)
    assert read_outcome(tmp_path) == {"outcome": before}


def test_a_refusal_leaves_a_living_run_alone(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(checkpoints)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        record(tmp_path).write(failed(), begun=False)
        assert read_outcome(tmp_path) is None
    finally:
        holder.kill()
        holder.communicate()
    record(tmp_path).write(failed(), begun=False)
    assert read_outcome(tmp_path) is not None


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "outcome.json").write_text(content)
    assert read_outcome(tmp_path) is None


def test_lost_peers_are_told_from_other_errors() -> None:
    assert is_lost_peer(LostRankError("could not meet"))
    assert is_lost_peer(RuntimeError("[pair.cc:537] Connection closed by peer [127.0.0.1]:5"))
    assert is_lost_peer(RuntimeError("Timed out waiting 1800000ms for recv operation to complete"))
    assert not is_lost_peer(RuntimeError("CUDA error: out of memory"))
    assert not is_lost_peer(ParallelError("rank 1 failed: no data"))
    assert LostRankError("x").exit_code == EXIT_CRASH


def test_the_watch_and_the_record_need_no_torch() -> None:
    names = ("parallel.watch", "parallel.watchdog", "parallel.hang_folder", "parallel.flight")
    imports = "; ".join(f"import mpotrain.{name}" for name in (*names, "run_end"))
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 0
