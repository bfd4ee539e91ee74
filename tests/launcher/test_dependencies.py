"""`--after`: what sbatch is told, and jobs that SLURM does not know."""

from pathlib import Path

import pytest
from launch_fakes import make_fake
from slurm_commands_fake import FakeSlurm

from launcher.dependencies import dependency, jobs_before, require_known
from launcher.launch_error import LaunchError
from mpotrain.errors import ConfigError


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("12", "afterok:12"),
        ("12:ok", "afterok:12"),
        ("12_3:any", "afterany:12_3"),
        ("1,2:any", "afterok:1,afterany:2"),
    ],
)
def test_dependencies(after: str, expected: str) -> None:
    assert dependency(after) == expected


@pytest.mark.parametrize("after", ["", "x", "12:", "12:never", "12 ", "1,,2", "1?2", "٣", "-1"])
def test_wrong_dependencies(after: str) -> None:
    with pytest.raises(ConfigError, match="--after"):
        dependency(after)


def test_jobs_before() -> None:
    assert jobs_before("12:any,3_4,5:ok") == ("12", "3_4", "5")


def test_jobs_that_slurm_knows(slurm: FakeSlurm) -> None:
    slurm.add("12", "PENDING")
    slurm.add("13", "COMPLETED")
    slurm.add("14_0", "RUNNING", raw="15")
    require_known(["12", "13", "14", "14_0"])
    require_known([])


def test_jobs_that_slurm_does_not_know(slurm: FakeSlurm) -> None:
    slurm.add("12", "PENDING")
    with pytest.raises(LaunchError, match="does not know job 13, 14_7 "):
        require_known(["12", "13", "14_7"])


def test_task_that_an_array_does_not_have(slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "bin" / "scontrol").unlink()
    make_fake(tmp_path / "bin", "scontrol", output="Job 14_7 not found\n", code=1)
    with pytest.raises(LaunchError, match="does not know job 14_7"):
        require_known(["14_7"])


def test_silent_controller_is_no_answer(slurm: FakeSlurm) -> None:
    slurm.set(trouble={"scontrol": "Unable to contact slurm controller"})
    with pytest.raises(LaunchError, match=r"cannot tell .* job 12: .*Unable"):
        require_known(["12"])
