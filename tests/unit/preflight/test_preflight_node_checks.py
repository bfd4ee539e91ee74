"""Checks of a node by itself: disks that are full or lie, wrong sums, clocks, versions, limits."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpotrain.preflight import clock, gpus, versions
from mpotrain.preflight.bounded import HardLimit, Task
from mpotrain.preflight.clock import compare_clocks
from mpotrain.preflight.disk import BLOCK_BYTES, measure_disk
from mpotrain.preflight.folder import SUMMARY_NAME, ReportFolder, report_name
from mpotrain.preflight.gpus import damaged_memory, wrong_product
from mpotrain.preflight.versions import driver_version, node_versions, source_digest


def test_a_good_disk_has_a_speed_and_keeps_nothing(tmp_path: Path) -> None:
    facts = measure_disk("run folder", tmp_path / "new" / "folder", 2 * BLOCK_BYTES + 1)
    assert facts.error is None
    assert facts.free_gib is not None
    assert facts.free_gib > 0
    assert facts.write_mib_per_s is not None
    assert facts.write_mib_per_s > 0
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_disk_that_fills_up_is_seen_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = os.write, []

    def full(descriptor: int, data: Any) -> int:
        if sum(written) >= BLOCK_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(descriptor, data))
        return written[-1]

    monkeypatch.setattr(os, "write", full)
    facts = measure_disk("run folder", tmp_path, 3 * BLOCK_BYTES)
    assert facts.error == "cannot be written (No space left on device)"
    assert facts.write_mib_per_s is None
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_changes_bytes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def lossy(descriptor: int, data: Any) -> int:
        changed = bytearray(data)
        changed[-1] ^= 1
        return write(descriptor, changed)

    monkeypatch.setattr(os, "write", lossy)
    assert measure_disk("run folder", tmp_path, BLOCK_BYTES).error == (
        "what was read is not what was written"
    )


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    facts = measure_disk("temporary folder", tmp_path / "file" / "sub")
    assert facts.error == "cannot be written (Not a directory)"


def test_products_are_right_here_and_one_wrong_element_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cpu")
    assert wrong_product(device, 64) is None
    matmul = torch.Tensor.__matmul__

    def broken(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = matmul(left, right)
        if left.dtype == torch.bfloat16:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert wrong_product(device, 64) == (
        "1 of 4096 elements of a bfloat16 matrix product are wrong"
    )


def test_the_known_product_is_not_trivial() -> None:
    # Independent of `wrong_product`: sums of 128 products of -1, 0, 1 fit bf16's 8 bits exactly.
    values = torch.arange(-128, 129).float()
    assert torch.equal(values.bfloat16().float(), values)
    assert gpus.DEPTH == 128


def test_damaged_memory_is_read_from_nvidia_smi() -> None:
    answers = {
        "--query-gpu": "GPU-1, 0\nGPU-2, 3\nGPU-3, [N/A]\n",
        "--query-remapped-rows": "GPU-1, 0\nGPU-3, 1\nGPU-4, Yes\n",
    }

    def run(command: list[str]) -> str:
        assert command[0] == "nvidia-smi"
        return answers[command[1].split("=")[0]]

    found = damaged_memory(run)
    assert set(found) == {"GPU-2", "GPU-3", "GPU-4"}
    assert found["GPU-2"].startswith("3 uncorrectable")
    assert damaged_memory(lambda command: None) == {}


def test_clocks_are_compared_by_the_quickest_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    delays = iter([(0.03, 0.02), (0.0005, 0.0015), (0.05, 0.0), (0.01, 0.04), (0.0, 0.05)])
    now = [1000.0]
    stand_in = SimpleNamespace(time=lambda: now[0] + 1e9, monotonic=lambda: now[0])
    monkeypatch.setattr(clock, "time", stand_in)

    def ask(number: int) -> float:
        there, back = next(delays)
        now[0] += there
        theirs = now[0] + 1e9 + 40.0
        now[0] += back
        return theirs

    facts = compare_clocks(ask)
    assert facts is not None
    assert facts.uncertainty == pytest.approx(0.001)
    assert facts.ahead - 40.0 == pytest.approx(-0.0005, abs=1e-6)
    assert compare_clocks(lambda number: None if number else 1e9) is None
    assert clock.NUM_EXCHANGES == 5


def test_versions_name_what_a_run_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = node_versions()
    assert found["torch"] == torch.__version__
    assert len(str(found["mpotrain source"])) == 16
    assert {"python", "deepspeed", "megatron-core", "NCCL", "NVIDIA driver"} <= set(found)
    monkeypatch.setattr(versions, "git_state", lambda folder: None)
    assert node_versions()["git commit"] is None


def test_source_digest_sees_every_change(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "sub" / "b.py").write_text("y = 2\n")
    digests = [source_digest(tmp_path)]
    (tmp_path / "sub" / "b.pyc").write_text("ignored")
    assert source_digest(tmp_path) == digests[0]
    (tmp_path / "sub" / "b.py").write_text("y = 3\n")
    digests.append(source_digest(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    digests.append(source_digest(tmp_path))
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Rel", "570.86.10"),
        ("nothing", None),
    ],
)
def test_the_drivers_version(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "missing") is None


def test_a_task_gives_results_errors_and_up() -> None:
    def fail() -> None:
        raise ValueError("no")

    hang = threading.Event()
    assert Task(lambda: 7, "counting").result(60) == 7
    with pytest.raises(ValueError, match="no"):
        Task(fail, "failing").result(60)
    task = Task(hang.wait, "waiting")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="waiting did not finish in 0 s"):
        task.result(0.1)
    assert time.monotonic() - start < 60
    hang.set()


def test_a_hard_limit_calls_once_and_can_be_moved_and_cancelled() -> None:
    called: list[float] = []
    start = time.monotonic()

    def note() -> None:
        called.append(time.monotonic() - start)

    cancelled = HardLimit(0.5, note)
    cancelled.cancel()
    limit = HardLimit(0.5, note)
    limit.reset(0.8)
    wait_until(lambda: bool(called))
    time.sleep(0.1)
    assert len(called) == 1
    assert called[0] >= 0.8
    assert limit.remaining == 0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_reports_of_earlier_pre_flights_do_not_count(tmp_path: Path) -> None:
    out = tmp_path / "reports"
    before = ReportFolder(out, "life 0")
    for name, number in (("a", 0), ("b/1", 1), ("c", 2)):
        assert before.write(report_name(name), {"number": number, "node": name}) is None
    assert before.write(SUMMARY_NAME, {"ok": True}) is None
    now = ReportFolder(out, "life 1")
    now.write(report_name("a"), {"number": 0, "node": "a"})
    assert set(now.reports("a", 60)) == {0}
    assert not now.has_summary()
    assert not now.sees("b/1", now.start)
    other = ReportFolder(out, "life 1")
    other.write(report_name("b/1"), {"number": 1, "node": "b/1"})
    other.write(SUMMARY_NAME, {"ok": False})
    assert now.has_summary()
    assert now.sees("b/1", other.start)
    assert now.reports("a", 60)[1]["node"] == "b/1"
    # Of the same world, but from long ago: the same command by hand, some minutes before.
    long_ago = time.time() - 100
    os.utime(out / report_name("b/1"), (long_ago, long_ago))
    assert set(now.reports("a", 60)) == {0}
    assert set(now.reports("a", 600)) == {0, 1}
    (out / "node-c.json").write_text('{"format": 1, "num')
    assert set(now.reports("a", 600)) == {0, 1}
    assert now.reports("nobody", 600) == {}


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = ReportFolder(tmp_path / "file", "w").write("node-a.json", {})
    assert error is not None
    assert "node-a.json cannot be written" in error
