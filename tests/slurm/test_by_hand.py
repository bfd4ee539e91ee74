"""What people do themselves on a cluster: look before they submit, and call sbatch by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from slurm.cluster_faults import SLOW
from slurm.lab_fixture import SlurmLab
from slurm.scenario import NO_CHECK, ROOT, Make, Scenario, full

from launcher.job_size import JobSize, job_size
from mpotrain.errors import EXIT_BAD_INPUT, EXIT_DONE
from mpotrain.run_record import ENVIRONMENT_FILE

SHORT = ("train.steps=40", *SLOW)


def dry_run(scenario: Scenario, *options: str) -> tuple[int, str]:
    done = scenario.launcher(
        "slurm", str(scenario.run_file), "--cluster", str(scenario.cluster_file), "--dry-run",
        *options, *scenario.overrides, check=False,
    )  # fmt: skip
    assert not scenario.folder.exists()
    return done.returncode, done.stdout + done.stderr


def test_a_dry_run_knows_what_slurm_takes(make: Make) -> None:
    code, shown = dry_run(make(NO_CHECK))
    assert code == EXIT_DONE, shown
    assert "sbatch" in shown
    code, shown = dry_run(make(NO_CHECK, 'partition = "nowhere"'))
    assert code == EXIT_BAD_INPUT, shown
    assert "invalid partition" in shown.lower()
    code, shown = dry_run(make(NO_CHECK, 'memory = "9000G"'))
    assert code == EXIT_BAD_INPUT, shown
    assert "sbatch --test-only refuses the job" in shown
    code, shown = dry_run(make(NO_CHECK), "--after", "999999")
    assert code == EXIT_BAD_INPUT, shown
    assert "999999" in shown


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (
            ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gres=gpu:2"],
            JobSize(nodes=2, tasks=2, cpus_per_task=1, cpus=2, gpus=2),
        ),
        (["--gres=gpu:1"], JobSize(nodes=1, tasks=None, cpus_per_task=None, cpus=1, gpus=1)),
        (
            ["--nodes=2", "--ntasks=2", "--cpus-per-task=1"],
            JobSize(nodes=2, tasks=1, cpus_per_task=1, cpus=1, gpus=0),
        ),
    ],
    ids=["all", "a GPU", "tasks in all"],
)
def test_what_slurm_says_of_the_size_of_a_job(
    fresh_lab: SlurmLab, tmp_path: Path, options: list[str], size: JobSize
) -> None:
    argv = [*options, f"--output={tmp_path}/env", "--chdir=/", "--wrap=env"]
    fresh_lab.wait_state(fresh_lab.sbatch(argv), "COMPLETED")
    lines = (tmp_path / "env").read_text(encoding="utf-8").splitlines()
    found = dict(line.partition("=")[::2] for line in lines if line.startswith("SLURM_"))
    assert job_size(found) == size


@pytest.mark.parametrize(
    ("num_nodes", "num_ranks"), [(2, 1), pytest.param(1, 4, marks=full)], ids=["2 x 1", "1 x 4"]
)
def test_sbatch_by_hand_has_the_size_of_its_options(
    make: Make, num_nodes: int, num_ranks: int
) -> None:
    """The cluster file says two ranks on each of two nodes."""
    scenario = make(NO_CHECK, overrides=SHORT)
    argv = [
        f"--nodes={num_nodes}", f"--ntasks-per-node={num_ranks}",
        f"--output={scenario.root}/job.txt",
        str(ROOT / "slurm" / "train.sbatch"), str(scenario.run_file),
        "--cluster", str(scenario.cluster_file), *scenario.overrides,
    ]  # fmt: skip
    job_id = scenario.lab.sbatch(
        argv, {"MPOTRAIN_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}, cwd=scenario.root
    )
    # The second life has the size of the first one, although nobody is there to say so.
    scenario.wait_for_step(2)
    scenario.lab.run(["scancel", "--signal=USR1", "--batch", job_id])
    scenario.wait_until_done()
    lives = scenario.events("started")
    assert len(lives) == 2, scenario.events()
    assert {len(life["nodes"]) for life in lives} == {num_nodes}
    assert worlds(scenario.folder) == [num_nodes * num_ranks] * 2
    said = (scenario.root / "job.txt").read_text(encoding="utf-8")
    assert f"the job has {num_nodes} nodes x {num_ranks} ranks with 1 CPUs each" in said
    assert [step for step, _, _ in scenario.curve()] == list(range(1, 41))


def worlds(run_folder: Path) -> list[int]:
    lines = (run_folder / ENVIRONMENT_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["world_size"] for line in lines]
