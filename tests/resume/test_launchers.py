"""One run file: local, and every ZeRO stage on two processes under both real launchers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from run_process import curve, train, write_run

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


def test_zero3_splits_cores_embedding_and_recomputed_blocks(
    markov_data: Path, tmp_path: Path
) -> None:
    """Nothing stays whole: every core, tied tensorized embedding and norm is gathered for use."""
    model = [
        "model.activation_checkpointing=true",
        "model.sites.embedding={kind='mpo', in_modes=[8, 8], out_modes=[4, 8], cap=12}",
        "model.sites.qkv={kind='mpo', in_modes=[4, 8], out_modes=[8, 12], cap=8, plan='chain'}",
        "model.sites.attention_out={kind='ttm', rank=6, keep_weight=true}",
    ]
    runs = [write_run(tmp_path / name, markov_data) for name in ("local", "zero")]
    train(runs[0], *model)
    engine = "engine={kind='deepspeed', zero_stage=3, persistence_threshold=0}"
    train(runs[1], *model, engine, launcher="torchrun", world=2)
    same_curve(tmp_path / "zero" / "run", tmp_path / "local" / "run")
