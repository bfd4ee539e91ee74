"""Mixtures of experts through the command line: any layout goes on where another one stopped."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_process import command, curve, environment, state, train
from test_launchers import same_curve

from mpotrain.train.journal import read_metrics

MIXTURE = [
    "model.moe={num_experts=4, every=2, "
    "router={top_k=2, balance_rate=1e-3, capacity_factor=1.0, jitter=0.05}, "
    "c_fc={kind='mpo', start='independent', in_modes=[4,4,2], out_modes=[4,8,4], cap=6}, "
    "c_proj={kind='asymmetric', start='independent', in_mode=16, out_mode=8}}",
    "train.central_mask={probability=0.3, granularity='tensor'}",
]
ZERO = "engine={{kind='deepspeed', zero_stage={}}}"


def test_experts_move_between_layouts(new_run: Callable[[], Path]) -> None:
    alone = new_run()
    train(alone, *MIXTURE)
    run = new_run()
    for world, experts, stage, last in ((4, 4, 1, 7), (2, 1, 2, 14), (2, 2, 1, 20)):
        layout = [ZERO.format(stage), f"parallel.expert={experts}", f"train.stop_after={last}"]
        train(run, *MIXTURE, *layout, launcher="torchrun", world=world)
    folder = run.parent / "run"
    same_curve(folder, alone.parent / "run")
    moved, whole = state(folder, 20), state(alone.parent / "run", 20)
    assert moved.keys() == whole.keys()
    assert moved["blocks.1.ffn.router.balance"].keys() == {"weight"}
    assert moved["blocks.1.ffn.c_fc.auxiliaries.0"]["weight"].shape[0] == 4
    for name in whole:
        if not name.endswith("qkv.bias"):  # the gradient of a key bias is rounding alone
            for kind, tensor in whole[name].items():
                largest = tensor.abs().max().clamp(min=1e-6)
                assert float((moved[name][kind] - tensor).abs().max() / largest) < 1e-4, name
    loads = [record for record in read_metrics(folder, "router") if record["step"] == 20]
    assert len(loads) == 1


def test_resume_in_the_same_layout_is_bitwise(new_run: Callable[[], Path]) -> None:
    layout = [*MIXTURE, ZERO.format(2), "parallel.expert=2"]
    straight, run = new_run(), new_run()
    train(straight, *layout, launcher="torchrun", world=2)
    train(run, *layout, "train.stop_after=9", launcher="torchrun", world=2)
    train(run, *layout, launcher="torchrun", world=2)
    got, expected = state(run.parent / "run", 20), state(straight.parent / "run", 20)
    assert got.keys() == expected.keys()
    for name, tensors in expected.items():
        assert got[name].keys() == tensors.keys()
        for kind, tensor in tensors.items():
            assert torch.equal(got[name][kind], tensor), f"{kind} of {name}"
    assert curve(run.parent / "run") == curve(straight.parent / "run")


def evaluate(run: Path, world: int) -> float:
    done = subprocess.run(
        command("torchrun" if world > 1 else "alone", world,
                ["eval", str(run.parent / "run"), "--sequences", "50", "--json"]),
        capture_output=True, text=True, timeout=240, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout[done.stdout.index("{") :])["loss"])


def test_evaluation_runs_on_ranks_that_the_degree_does_not_divide(
    new_run: Callable[[], Path],
) -> None:
    run = new_run()
    train(run, *MIXTURE, ZERO.format(1), "parallel.expert=2", "train.stop_after=2",
          launcher="torchrun", world=2)  # fmt: skip
    assert evaluate(run, 3) == pytest.approx(evaluate(run, 1), rel=1e-5)
