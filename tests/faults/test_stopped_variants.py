"""Ctrl-C and SIGTERM while variants are trained: the child saves, the next start goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_process import curve, environment, prepare_markov, train, wait_for_step, write_run

SCRIPT = Path(__file__).with_name("compare_variants.py")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Any, ...]]]:
    """A run, long enough for a busy machine to stop it in time, and its curve without a stop."""
    root = tmp_path_factory.mktemp("reference")
    run = write_run(root, prepare_markov(root / "data"))
    run.write_text(run.read_text().replace("\nsteps = 20\n", "\nsteps = 40\n"))
    train(run)
    points = curve(root / "run")
    assert len(points) == 40
    return run, points


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_comparison_goes_on(
    number: signal.Signals, tmp_path: Path, reference: tuple[Path, list[tuple[Any, ...]]]
) -> None:
    run, straight = reference
    folder = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(run), str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    wait_for_step(folder / "ttm", 3, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to all processes at once
    else:
        process.send_signal(number)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 85, out
    assert "ttm was stopped and saved; run the same command to go on" in out
    assert "Traceback" not in out
    step = curve(folder / "ttm")[-1][0]
    assert (folder / "ttm" / "checkpoints" / f"step-{step:08d}").is_dir()
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming ttm at step {step}" in done.stderr
    assert "| dense |" in done.stdout
    assert (folder / "loss.png").stat().st_size > 1000
    assert curve(folder / "ttm") == straight


def test_a_variant_that_fails_passes_its_exit_code_on(tmp_path: Path) -> None:
    run = write_run(tmp_path, tmp_path / "no-data")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(run), str(tmp_path / "out")],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "ttm ended with exit code 2; run it alone: mpotrain train" in done.stdout
