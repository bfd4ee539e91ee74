"""Fine-tuning is the same on every engine and any number of ranks, and moves between them."""

import subprocess
from pathlib import Path

import pytest
from run_process import command, environment, state
from unit.tune.tuning import prepare_stories, write_pretraining, write_tuning

from mpotrain.cli import main
from mpotrain.train.journal import read_metrics

ZERO = "engine={{kind='deepspeed', zero_stage={}}}"
STEPS = 6
SHORT = [f"train.steps={STEPS}", "train.eval_every=3", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a tiny depth-shared encoder."""
    root = tmp_path_factory.mktemp("encoder")
    assert main(["train", str(write_pretraining(root, prepare_stories(root / "data")))]) == 0
    return root / "encoder"


@pytest.fixture(scope="module")
def alone(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a regression fine-tuned by the local engine, and the file beside it."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(["tune", str(write_tuning(folder, encoder, kind="stsb")), *SHORT]) == 0
    return folder / "run"


def tune(run: Path, *overrides: str) -> None:
    """Fine-tune on two ranks."""
    done = subprocess.run(
        command("torchrun", 2, ["tune", str(run), "--method", "full", *SHORT, *overrides]),
        capture_output=True, text=True, timeout=240, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def assert_same(folder: Path, reference: Path) -> None:
    """Compare losses, norms, evaluations and final weights."""
    for kind, keys in {
        "train": ("loss", "grad_norm"),
        # Correlations of the nearly constant predictions of so early a model are rounding alone:
        # tests/distributed/test_task_evaluation.py holds them equal.
        "eval": ("loss",),
    }.items():
        got, expected = read_metrics(folder, kind), read_metrics(reference, kind)
        assert [line["step"] for line in got] == [line["step"] for line in expected]
        for one, other in zip(got, expected, strict=True):
            for key in keys:
                assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), (kind, key)
    assert [line["num_examples"] for line in read_metrics(folder, "eval")] == [37, 37]
    got_state, expected_state = state(folder, STEPS), state(reference, STEPS)
    assert got_state.keys() == expected_state.keys()
    for name, tensors in expected_state.items():
        if name.endswith("key.bias"):  # its gradient is rounding alone
            continue
        weight = tensors["weight"]
        difference = (got_state[name]["weight"] - weight).abs().max()
        assert float(difference / weight.abs().max().clamp(min=1e-3)) < 1e-4, name


def test_zero_1_on_two_ranks_equals_one_process(alone: Path, tmp_path: Path) -> None:
    tune(alone.parent / "tuning.toml", ZERO.format(1), f"folder={tmp_path / 'run'}")
    assert_same(tmp_path / "run", alone)


def test_a_run_moves_between_layouts(alone: Path, tmp_path: Path) -> None:
    """Local, then ZeRO-3 on two ranks, then ZeRO-2, two steps each."""
    run, folder = alone.parent / "tuning.toml", f"folder={tmp_path / 'run'}"
    assert main(["tune", str(run), *SHORT, folder, "train.stop_after=2"]) == 0
    tune(run, ZERO.format(3), folder, "train.stop_after=4")
    tune(run, ZERO.format(2), folder)
    assert_same(tmp_path / "run", alone)
