"""metrics.jsonl: valid JSON, whole lines, and no step twice after a resume."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpotrain.errors import StorageError
from mpotrain.train.journal import Journal, plain_json, read_metrics


def write(path: Path, steps: range, resume_step: int | None = None, **values: object) -> int:
    journal = Journal(path, resume_step=resume_step)
    for step in steps:
        journal.append({"step": step, "kind": "train", "loss": step / 7, **values})
    journal.sync()
    journal.close()
    return journal.num_dropped


def refuse(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_nonfinite_values_are_valid_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1.5, 2), "e": "text"}
    write(path, range(1, 2), **values)
    record = json.loads(path.read_text(), parse_constant=refuse)
    assert (record["a"], record["b"], record["d"]) == ("nan", ["inf", {"c": "-inf"}], [1.5, 2])
    (back,) = read_metrics(path)
    assert math.isnan(back["a"])
    assert back["b"] == [math.inf, {"c": -math.inf}]
    assert (back["d"], back["e"], back["loss"]) == ([1.5, 2], "text", 1 / 7)


def test_resume_drops_later_lines_and_leaves_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 11), life=1)
    kept = path.read_bytes().splitlines(keepends=True)[:6]
    assert write(path, range(7, 13), resume_step=6, life=2) == 4
    assert path.read_bytes().splitlines(keepends=True)[:6] == kept
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["life"] for record in records] == [1] * 6 + [2] * 6


def test_resume_with_nothing_to_drop_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    inode, content = path.stat().st_ino, path.read_bytes()
    assert write(path, range(0), resume_step=3) == 0
    assert (path.stat().st_ino, path.read_bytes()) == (inode, content)


def test_new_run_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(4))
    assert write(path, range(0), resume_step=None) == 4
    assert path.read_bytes() == b""


def test_torn_and_foreign_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 3))
    good = path.read_bytes()
    path.write_bytes(b'{"no": "step"}\n[1]\n\xff\xfe\n' + good + b'{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert write(path, range(3, 4), resume_step=2) == 4
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert path.read_bytes().startswith(good)


def test_a_whole_record_without_newline_is_torn(tmp_path: Path) -> None:
    """Appending to it would glue two records together."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 3))
    path.write_bytes(path.read_bytes()[:-1])
    assert write(path, range(2, 4), resume_step=2) == 1
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_read_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, resume_step=None)
    journal.append({"step": 1, "kind": "train"})
    journal.append({"step": 1, "kind": "eval"})
    journal.close()
    journal.close()
    assert len(read_metrics(path)) == 2
    assert [record["kind"] for record in read_metrics(path, kind="eval")] == ["eval"]


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.jsonl: cannot be read"):
        read_metrics(tmp_path / "absent.jsonl")
    with pytest.raises(StorageError, match=r"cannot be opened for writing"):
        Journal(tmp_path / "absent" / "metrics.jsonl", resume_step=None)


def test_plain_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", resume_step=None)
    with pytest.raises(TypeError):
        journal.append({"step": 1, "value": object()})
    journal.close()
    assert journal.path.read_bytes() == b""
    assert plain_json({1: 2.0}) == {"1": 2.0}


WRITER = """
import sys
from pathlib import Path
from mpotrain.train.journal import Journal
journal = Journal(Path(sys.argv[1]), resume_step=None)
print("ready", flush=True)
step = 0
while True:
    step += 1
    journal.append({"step": step, "kind": "train", "filler": "x" * 3000})
"""


def test_kill_in_the_middle_of_writing_then_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while path.stat().st_size < 2**20:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    steps = [record["step"] for record in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    write(path, range(101, 111), resume_step=100)
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 111))


FULL = """
import resource, sys
from pathlib import Path
from mpotrain.errors import StorageError
from mpotrain.train.journal import Journal, read_metrics
path = Path(sys.argv[1])
journal = Journal(path, resume_step=None)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
try:
    for step in range(1, 1000):
        journal.append({"step": step, "kind": "train"})
except StorageError as error:
    assert "metrics.jsonl" in str(error), error
else:
    sys.exit("no error")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
journal.append({"step": step, "kind": "train"})
steps = [record["step"] for record in read_metrics(path)]
assert steps == list(range(1, step + 1)), steps
assert path.read_bytes().count(b"\\n") == step
"""


def test_full_disk_leaves_whole_lines_and_can_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "metrics.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_cut_keeps_the_old_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 9))
    content = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(StorageError, match="No space left"):
        Journal(path, resume_step=4)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
