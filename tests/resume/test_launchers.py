"""One run file: local, and every ZeRO stage on two processes under both real launchers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from run_process import curve, train

TOLERANCE = 1e-5


def same_curve(folder: Path, reference: Path, tolerance: float = TOLERANCE) -> None:
    """Compare losses and gradient norms within a tolerance, everything else exactly."""
    got, expected = curve(folder), curve(reference)
    assert len(got) == len(expected) == 20
    for (step, loss, lr, norm, *rest), (step_0, loss_0, lr_0, norm_0, *rest_0) in zip(
        got, expected, strict=True
    ):
        assert (step, lr, rest) == (step_0, lr_0, rest_0)
        assert loss == pytest.approx(loss_0, rel=tolerance)
        assert norm == pytest.approx(norm_0, rel=10 * tolerance)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_on_two_processes_follows_the_local_curve(
    stage: int, launcher: str, straight_run: Path, new_run: Callable[[], Path]
) -> None:
    run = new_run()
    train(run, f"engine={{kind='deepspeed', zero_stage={stage}}}", launcher=launcher, world=2)
    same_curve(run.parent / "run", straight_run)


def test_local_refuses_two_processes(new_run: Callable[[], Path]) -> None:
    done = train(new_run(), launcher="torchrun", world=2, code=1)
    assert "the local engine runs one process, but the world has 2" in done.stderr


def test_a_world_that_does_not_divide_the_batch_is_refused(new_run: Callable[[], Path]) -> None:
    run = new_run()
    done = train(run, "engine.kind=deepspeed", launcher="torchrun", world=3, code=1)
    assert "train.global_batch_size" in done.stderr
    assert "nearest valid choices" in done.stderr
    assert not (run.parent / "run").exists()
