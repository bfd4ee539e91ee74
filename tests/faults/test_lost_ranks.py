"""One rank dies: the others end by themselves, and the run goes on from its last checkpoint."""

import json
import signal
from pathlib import Path

import psutil
import pytest
from launched_ranks import workers
from run_process import curve, prepare_markov, start, train, wait_for_step, write_run

ENGINE = "engine={kind='deepspeed', zero_stage=1}"


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_start_and_the_next_goes_on(killed: int, tmp_path: Path) -> None:
    data = prepare_markov(tmp_path / "data")
    run, straight = write_run(tmp_path / "a", data), write_run(tmp_path / "b", data)
    folder = tmp_path / "a" / "run"
    process = start(run, ENGINE, "train.log_every=1", launcher="torchrun", world=2)
    wait_for_step(folder, 6, process)
    ranks = workers(process)
    assert set(ranks) == {0, 1}
    survivor = ranks[1 - killed]
    ranks[killed].send_signal(signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    if process.returncode == 0:
        pytest.skip("the run was over before the rank was killed")
    assert not survivor.is_running() or survivor.status() == psutil.STATUS_ZOMBIE
    outcome = folder / "outcome.json"
    if killed == 1 and outcome.exists():
        assert json.loads(outcome.read_text())["outcome"] == "resume", output
    train(run, ENGINE, launcher="torchrun", world=2)
    train(straight, ENGINE, launcher="torchrun", world=2)
    assert curve(folder) == curve(tmp_path / "b" / "run")


def test_orphans_of_a_killed_launcher_save_and_leave(tmp_path: Path) -> None:
    run = write_run(tmp_path, prepare_markov(tmp_path / "data"))
    folder = tmp_path / "run"
    process = start(run, ENGINE, "train.steps=4000", launcher="torchrun", world=2)
    wait_for_step(folder, 3, process)
    ranks = workers(process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=60)
    for orphan in alive:
        orphan.kill()
    assert not alive
    assert json.loads((folder / "outcome.json").read_text())["outcome"] == "resume"
    step = curve(folder)[-1][0]
    assert (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
