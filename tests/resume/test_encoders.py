"""Depth-shared encoders and T5 through the command line: stop, go on, change the layout."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoder_runs import folder_of, prepare_stories, write_kind
from run_process import command, curve, environment, state, train
from test_launchers import same_curve

from mpotrain.train.journal import read_metrics

ZERO = "engine={{kind='deepspeed', zero_stage={}, persistence_threshold=0}}"
LAYOUTS = {
    "encoder": [(2, 3, ()), (4, 1, ()), (2, 2, ())],
    "t5": [(2, 1, ("parallel.expert=2",)), (2, 3, ()), (4, 2, ("parallel.expert=4",))],
}
"""World, ZeRO stage and overrides of three starts of one run."""


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared short documents."""
    return prepare_stories(tmp_path_factory.mktemp("stories") / "data")


@pytest.fixture
def new(stories: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """Write the run file of a kind with a run folder of its own."""
    return lambda kind, name: write_kind(kind, tmp_path / name, stories)


@pytest.mark.parametrize("kind", ["encoder", "t5"])
def test_resume_in_the_same_layout_is_bitwise(new: Callable[[str, str], Path], kind: str) -> None:
    straight, run = new(kind, "straight"), new(kind, "stopped")
    train(straight)
    train(run, "train.stop_after=8")
    train(run)
    got, expected = state(folder_of(run), 20), state(folder_of(straight), 20)
    assert got.keys() == expected.keys()
    for name, tensors in expected.items():
        for tensor_kind, tensor in tensors.items():
            assert torch.equal(got[name][tensor_kind], tensor), f"{tensor_kind} of {name}"
    assert curve(folder_of(run)) == curve(folder_of(straight))


@pytest.mark.parametrize("kind", ["encoder", "t5"])
def test_a_run_moves_between_stages_and_worlds(new: Callable[[str, str], Path], kind: str) -> None:
    alone, run = new(kind, "alone"), new(kind, "moved")
    train(alone)
    for (world, stage, more), last in zip(LAYOUTS[kind], (6, 12, 20), strict=True):
        layout = [ZERO.format(stage), f"train.stop_after={last}", *more]
        train(run, *layout, launcher="torchrun", world=world)
    same_curve(folder_of(run), folder_of(alone))
    records = [read_metrics(folder_of(path), "eval")[-1] for path in (run, alone)]
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-5)
    assert records[0]["num_tokens"] == records[1]["num_tokens"]
    if kind == "encoder":
        assert records[0]["pair_loss"] == pytest.approx(records[1]["pair_loss"], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_resume_under_deepspeed_is_bitwise(new: Callable[[str, str], Path], stage: int) -> None:
    straight, run = new("encoder", "straight"), new("encoder", "stopped")
    layout = [ZERO.format(stage)]
    train(straight, *layout, launcher="torchrun", world=2)
    train(run, *layout, "train.stop_after=8", launcher="torchrun", world=2)
    train(run, *layout, launcher="torchrun", world=2)
    got, expected = state(folder_of(run), 20), state(folder_of(straight), 20)
    for name, tensors in expected.items():
        for kind, tensor in tensors.items():
            assert torch.equal(got[name][kind], tensor), f"{kind} of {name}"
    assert curve(folder_of(run)) == curve(folder_of(straight))


def test_frozen_central_tensors_stay_bit_for_bit(new: Callable[[str, str], Path]) -> None:
    run = new("encoder", "frozen")
    train(run, "train.central_mask={probability=1.0}", "train.stop_after=6")
    train(run, "train.central_mask={probability=1.0}", ZERO.format(3), launcher="torchrun", world=2)
    first, last = state(folder_of(run), 6), state(folder_of(run), 20)
    banked = [name for name in first if name.startswith("bank.")]
    assert len(banked) == 6  # three families, two groups
    for name in first:
        equal = torch.equal(first[name]["weight"], last[name]["weight"])
        assert equal == (name in banked), name


@pytest.mark.parametrize("kind", ["encoder", "t5"])
def test_evaluation_tells_loss_and_accuracy(new: Callable[[str, str], Path], kind: str) -> None:
    run = new(kind, "run")
    train(run, "train.stop_after=10")
    done = subprocess.run(
        command("alone", 1, ["eval", str(folder_of(run)), "--sequences", "12", "--json"]),
        capture_output=True, text=True, timeout=240, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, logged = json.loads(done.stdout), read_metrics(folder_of(run), "eval")[-1]
    assert told["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert told["accuracy"] == pytest.approx(logged["accuracy"])
    assert 0 < told["num_tokens"] < 12 * 48  # a part of the text alone is predicted
    assert told["bits_per_byte"] is None
    assert ("pair_loss" in told) == (kind == "encoder")
