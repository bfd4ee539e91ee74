"""SIGKILL in the middle of a save: the run goes on from the checkpoint before, sample by sample."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_process import curve, environment, prepare_markov, write_run

SCRIPT = Path(__file__).with_name("killed_run.py")


def run_script(run: Path, ledger: Path, *kill: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(run), str(ledger), *kill],
        capture_output=True, text=True, timeout=240, env=environment(), check=False,
    )  # fmt: skip


def read(ledger: Path) -> list[tuple[int, list[int], list[float]]]:
    return [tuple(json.loads(line)) for line in ledger.read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and the folder of an uninterrupted run with its ledger."""
    root = tmp_path_factory.mktemp("reference")
    data = prepare_markov(root / "data")
    run = write_run(root / "r", data)
    done = run_script(run, root / "ledger")
    assert done.returncode == 0, done.stderr
    return data, root


@pytest.mark.parametrize("point", ["part", "part_written", "manifest", "published", "pointer"])
def test_killed_in_a_save_no_step_is_lost_beyond_it_and_no_sample_repeated_or_skipped(
    point: str, reference: tuple[Path, Path], tmp_path: Path
) -> None:
    data, root = reference
    run, ledger = write_run(tmp_path, data), tmp_path / "ledger"
    assert run_script(run, ledger, point, "10").returncode == -signal.SIGKILL
    first = read(ledger)
    assert [entry[0] for entry in first] == list(range(10))
    done = run_script(run, ledger)
    assert done.returncode == 0, done.stderr
    second = read(ledger)[len(first) :]
    # Once the folder has its final name the checkpoint counts; before that the one of step 5 does.
    resumed = 10 if point in ("published", "pointer") else 5
    assert f"resuming tiny at step {resumed} of 20" in done.stderr
    assert [entry[0] for entry in second] == list(range(resumed, 20))
    straight = read(root / "ledger")
    assert first == straight[:10]
    assert second == straight[resumed:]
    seen = [sample for entry in first[:resumed] + second for sample in entry[1]]
    assert seen == list(range(20 * 8))
    assert curve(tmp_path / "run") == curve(root / "r" / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp-*"))
