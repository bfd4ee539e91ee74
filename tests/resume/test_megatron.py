"""The Megatron engine through the command line: any layout goes on where any other stopped."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_process import command, curve, environment, state, train
from test_launchers import same_curve

from mpotrain.train.journal import read_metrics

# A learning rate at which Adam does not blow up gradients of rounding size beyond the tolerance.
PLAIN = ["model.dropout=0.0", "model.attention_dropout=0.0", "train.schedule.lr=1e-3"]
MIXTURE = [
    *PLAIN,
    "model.moe={num_experts=4, every=2, router={top_k=2, balance_rate=1e-3}, "
    "c_fc={kind='mpo', start='independent', in_modes=[4,4,2], out_modes=[4,8,4], cap=6}, "
    "c_proj={kind='asymmetric', start='independent', in_mode=16, out_mode=8}}",
    "train.central_mask={probability=0.3, granularity='tensor'}",
]
TENSOR_PIPELINE = ["parallel={tensor=2, sequence=true, pipeline=2}"]
SPLIT = "engine={kind='megatron', overlap_grad_reduce=true, overlap_param_gather=true}"
MEGATRON = "engine={kind='megatron'}"
ZERO = "engine={{kind='deepspeed', zero_stage={}}}"


def test_a_run_moves_between_engines(new_run: Callable[[], Path]) -> None:
    alone, run = new_run(), new_run()
    train(alone, *MIXTURE)
    starts: list[tuple[int, list[str]]] = [
        (4, [MEGATRON, *TENSOR_PIPELINE]),
        (2, [ZERO.format(2)]),
        (2, [SPLIT, "parallel={expert=2}"]),
        (1, []),
    ]
    for (world, layout), last in zip(starts, (5, 10, 15, 20), strict=True):
        launcher = "torchrun" if world > 1 else "alone"
        stop = f"train.stop_after={last}"
        train(run, *MIXTURE, *layout, stop, launcher=launcher, world=world)
    folder = run.parent / "run"
    same_curve(folder, alone.parent / "run")
    moved, whole = state(folder, 20), state(alone.parent / "run", 20)
    assert moved.keys() == whole.keys()
    for name in whole:
        if not name.endswith("qkv.bias"):  # the gradient of a key bias is rounding alone
            for kind, tensor in whole[name].items():
                largest = tensor.abs().max().clamp(min=1e-6)
                assert float((moved[name][kind] - tensor).abs().max() / largest) < 1e-4, name
    validation = [read_metrics(path.parent / "run", "eval")[-1]["loss"] for path in (run, alone)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)


def test_resume_in_the_same_layout_is_bitwise(new_run: Callable[[], Path]) -> None:
    # Dropout on: its random streams follow from counters, not from saved states.
    layout = [*MIXTURE[3:], "model.dropout=0.1", SPLIT, "parallel={tensor=2, sequence=true}"]
    straight, run = new_run(), new_run()
    train(straight, *layout, launcher="torchrun", world=4)
    train(run, *layout, "train.stop_after=9", launcher="torchrun", world=4)
    train(run, *layout, launcher="torchrun", world=4)
    got, expected = state(run.parent / "run", 20), state(straight.parent / "run", 20)
    assert got.keys() == expected.keys()
    for name, tensors in expected.items():
        assert got[name].keys() == tensors.keys()
        for kind, tensor in tensors.items():
            assert torch.equal(got[name][kind], tensor), f"{kind} of {name}"
    assert curve(run.parent / "run") == curve(straight.parent / "run")


def test_three_engines_follow_one_curve(new_run: Callable[[], Path]) -> None:
    layouts = {
        "local": (1, []),
        "zero": (2, [ZERO.format(1)]),
        "megatron": (4, [MEGATRON, "parallel={tensor=2, pipeline=2}"]),
    }
    curves = {}
    for name, (world, layout) in layouts.items():
        run = new_run()
        launcher = "torchrun" if world > 1 else "alone"
        train(run, *PLAIN, *layout, "train.steps=10", launcher=launcher, world=world)
        curves[name] = [(loss, norm) for _, loss, _, norm, *_ in curve(run.parent / "run")]
    assert len(curves["local"]) == 10
    for name in ("zero", "megatron"):
        for found, expected in zip(curves[name], curves["local"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5), name


def run_command(world: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of mpotrain on some processes."""
    return subprocess.run(
        command("torchrun" if world > 1 else "alone", world, list(arguments)),
        capture_output=True, text=True, timeout=240, env=environment(), check=False,
    )  # fmt: skip


def test_what_one_does_with_the_checkpoint_of_a_cut_network(new_run: Callable[[], Path]) -> None:
    run = new_run()
    layout = [MEGATRON, "parallel={data=1, tensor=2, pipeline=2, virtual_pipeline=1}"]
    train(run, *PLAIN, *layout, "train.stop_after=2", launcher="torchrun", world=4)
    folder = run.parent / "run"
    losses = []
    for world in (4, 1):
        told = ["--split", "validation", "--sequences", "50", "--json"]
        done = run_command(world, "eval", str(folder), *told)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr  # megatron-core has many, from every rank
        losses.append(float(json.loads(done.stdout[done.stdout.index("{") :])["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    done = run_command(3, "eval", str(folder))
    assert done.returncode != 0
    assert "parallel.tensor: tensor 2 x context 1 x pipeline 2 = 4 ranks" in done.stderr
    assert "start 4 processes" in done.stderr
    exported = run_command(1, "export", str(folder), str(run.parent / "exported"))
    assert exported.returncode == 0, exported.stderr
