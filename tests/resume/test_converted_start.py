"""A converted step 0 is taken up by every engine and layout, and continues alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import ADAPTER, ALBERT, CENTRAL, SHARED, Workshop
from run_process import curve, train, write_run

from mpotrain.cli import main

DENSE = [f'model.sites.{family}={{kind="dense"}}' for family in ("c_fc", "c_proj")]
MIXTURE = (
    "model.moe={num_experts=4, router={gate='straight_through', balance_rate=0.01}, "
    "c_fc={kind='mpo', in_modes=[4, 2, 4], out_modes=[4, 8, 4]}, "
    "c_proj={kind='asymmetric', in_mode=16, out_mode=8}}"
)
LAYOUTS = {
    "local": ("alone", 1, "engine.kind=local", 1),
    "zero1": ("torchrun", 2, "engine={kind='deepspeed', zero_stage=1}", 1),
    "zero1 with spread experts": ("torchrun", 2, "engine={kind='deepspeed', zero_stage=1}", 2),
}


@pytest.fixture(scope="module")
def dense(markov_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a trained dense model."""
    folder = tmp_path_factory.mktemp("dense")
    train(write_run(folder, markov_data), *DENSE)
    return folder / "run"


def test_every_layout_takes_up_the_converted_weights(
    dense: Path, new_run: Callable[[], Path], tmp_path: Path
) -> None:
    run = str(new_run())
    curves = {}
    for name, (launcher, world, engine, spread) in LAYOUTS.items():
        overrides = [*DENSE, MIXTURE, f'folder="{tmp_path / name}"', "train.steps=4"]
        overrides.append("checkpoint.every=4")
        assert main(["convert", str(dense), run, *overrides, "--to", "mpo-moe"]) == 0
        layout = [engine, f"parallel.expert={spread}"]
        done = train(Path(run), *overrides, *layout, launcher=launcher, world=world)
        assert "resuming tiny at step 0 of 4" in done.stdout + done.stderr
        curves[name] = curve(tmp_path / name)
    plain = tmp_path / "plain"
    overrides = [*DENSE, f'folder="{plain}"', "train.steps=4"]
    assert main(["convert", str(dense), run, *overrides, "--to", "gpt2"]) == 0
    train(Path(run), *overrides)
    for name, rows in curves.items():
        assert [row[0] for row in rows] == [1, 2, 3, 4]
        # The first loss is that of the dense model; dropout draws are those of the step.
        assert rows[0][1] == pytest.approx(curve(plain)[0][1], rel=1e-5), name
        for row, expected in zip(rows, curves["local"], strict=True):
            assert row[1] == pytest.approx(expected[1], rel=1e-5), name
            assert row[3] == pytest.approx(expected[3], rel=1e-4), name


DEEP = [*ALBERT, *CENTRAL, *ADAPTER]
ZERO3 = "engine={kind='deepspeed', zero_stage=3, persistence_threshold=0}"
ENCODER_LAYOUTS = {
    "local": ("alone", 1, "engine.kind=local"),
    "zero1": ("torchrun", 2, "engine={kind='deepspeed', zero_stage=1}"),
    "zero3": ("torchrun", 2, ZERO3),
}


def test_every_layout_takes_up_a_depth_shared_encoder(markov_data: Path, tmp_path: Path) -> None:
    shop = Workshop(tmp_path, markov_data)
    assert shop.train("encoder", "shared", *ALBERT, *SHARED) == 0
    same = shop.made(tmp_path / "shared", "encoder", "same", *ALBERT, *SHARED)
    assert shop.train("encoder", "same", *ALBERT, *SHARED) == 0
    curves = {}
    for name, (launcher, world, engine) in ENCODER_LAYOUTS.items():
        folder = shop.made(tmp_path / "shared", "encoder", name, *DEEP)
        run, _ = shop.run_file("encoder", name)
        train(run, *DEEP, engine, launcher=launcher, world=world)
        curves[name] = curve(folder)
    for name, rows in curves.items():
        assert [row[0] for row in rows] == [1, 2, 3]
        # The first loss is that of the shared model: adapters begin with zero.
        assert rows[0][1] == pytest.approx(curve(same)[0][1], rel=1e-5), name
        for row, expected in zip(rows, curves["local"], strict=True):
            assert row[1] == pytest.approx(expected[1], rel=1e-5), name
            assert row[3] == pytest.approx(expected[3], rel=1e-4), name
