"""Stop and go on: the same bits in the same layout, the same curve to 1e-5 in another."""

import fcntl
import json
import os
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_process import PYTHON, curve, environment, start, state, train, wait_for_step
from test_launchers import same_curve

from mpotrain.cli import main

ZERO = "engine={{kind='deepspeed', zero_stage={}}}"


def contents(folder: Path) -> dict[Path, bytes]:
    """Return every file of a run folder but the lock, which names the last process."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".writer")
    return {path: path.read_bytes() for path in files}


def assert_same_bits(folder: Path, reference: Path, step: int = 20) -> None:
    got, expected = state(folder, step), state(reference, step)
    assert got.keys() == expected.keys()
    for name, tensors in expected.items():
        assert tensors.keys() == {"weight", "exp_avg", "exp_avg_sq"}
        for kind, tensor in tensors.items():
            assert torch.equal(got[name][kind], tensor), f"{kind} of {name}"


def held_in_step(run: Path, step: int, terminal: int | None = None) -> subprocess.Popen[str]:
    """Start training and return when it stands in a step; a file `go-on` lets it go on.

    Args:
        run: the run file.
        step: counted from 0.
        terminal: where the process works, as the leader of a session; None for a pipe.
    """
    process = subprocess.Popen(
        [PYTHON, str(Path(__file__).with_name("held_run.py")), str(run), str(step)],
        stdin=terminal, stdout=subprocess.PIPE if terminal is None else terminal,
        stderr=subprocess.STDOUT, text=True, env=environment(),
        start_new_session=terminal is not None,
        preexec_fn=None if terminal is None else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    end = time.monotonic() + 240
    while not (run.parent / "held").exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_stops_at_a_step_and_the_resume_is_bitwise(
    number: signal.Signals, straight_run: Path, new_run: Callable[[], Path]
) -> None:
    run = new_run()
    folder = run.parent / "run"
    process = held_in_step(run, 6)
    process.send_signal(number)
    (run.parent / "go-on").touch()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 85, output
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["outcome"] == "resume"
    stopped_at = curve(folder)[-1][0]
    assert stopped_at == 7  # the step in which it came is finished
    assert (folder / "checkpoints" / f"step-{stopped_at:08d}" / "manifest.json").is_file()
    done = train(run)
    assert f"resuming tiny at step {stopped_at}" in done.stderr
    assert json.loads((folder / "outcome.json").read_text())["outcome"] == "done"
    assert curve(folder) == curve(straight_run)
    assert_same_bits(folder, straight_run)


def test_a_run_saves_when_its_terminal_is_closed(new_run: Callable[[], Path]) -> None:
    """SIGHUP comes, and from then on nothing can be written to the terminal."""
    run = new_run()
    folder = run.parent / "run"
    window, terminal = os.openpty()
    process = held_in_step(run, 3, terminal)
    os.close(terminal)
    os.close(window)
    (run.parent / "go-on").touch()
    assert process.wait(240) == 85
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["reason"], outcome["step"]) == ("resume", "SIGHUP", 4)
    assert (folder / "checkpoints" / "step-00000004" / "manifest.json").is_file()


def test_a_stop_file_stops_and_is_obeyed_once(new_run: Callable[[], Path]) -> None:
    run = new_run()
    folder = run.parent / "run"
    process = start(run, "train.steps=100000")
    wait_for_step(folder, 2, process)
    (folder / "stop").touch()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 85, output
    assert "the stop file was found" in output
    assert not (folder / "stop").exists()
    stopped_at = curve(folder)[-1][0]
    done = train(run, "train.steps=100000", f"train.stop_after={stopped_at + 2}")
    assert f"held: tiny at step {stopped_at + 2:,}" in done.stderr
    assert json.loads((folder / "outcome.json").read_text())["outcome"] == "held"
    assert [line[0] for line in curve(folder)] == list(range(1, stopped_at + 3))
    # A start beyond that step has nothing to do, and says so without training on.
    again = train(run, "train.steps=100000", "train.stop_after=1")
    assert f"held: tiny at step {stopped_at + 2:,}" in again.stderr


def test_resume_across_engines_stages_and_world_sizes(
    straight_run: Path, new_run: Callable[[], Path]
) -> None:
    """local -> ZeRO-3 on 2 -> ZeRO-1 on 1 -> ZeRO-2 on 4 -> local, five or fewer steps each."""
    run = new_run()
    until = "train.stop_after={}"
    train(run, until.format(4))
    train(run, ZERO.format(3), until.format(8), launcher="torchrun", world=2)
    train(run, ZERO.format(1), until.format(12))
    train(run, ZERO.format(2), until.format(16), launcher="torchrun", world=4)
    train(run)
    same_curve(run.parent / "run", straight_run)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_resumes_bitwise_in_the_same_layout(
    stage: int, new_run: Callable[[], Path], tmp_path: Path
) -> None:
    whole, parts = new_run(), tmp_path / "parts"
    one_rank = ZERO.format(stage)
    train(whole, one_rank)
    train(whole, one_rank, f"folder={parts}", "train.stop_after=10")
    train(whole, one_rank, f"folder={parts}")
    assert curve(parts) == curve(whole.parent / "run")
    assert_same_bits(parts, whole.parent / "run")


def test_a_finished_run_is_not_trained_further(new_run: Callable[[], Path]) -> None:
    run = new_run()
    train(run, "train.steps=2", "train.schedule.warmup_steps=0")
    before = state(run.parent / "run", 2)
    done = train(run, "train.steps=2", "train.schedule.warmup_steps=0")
    assert "done: tiny at step 2 of 2" in done.stderr
    after = state(run.parent / "run", 2)
    assert all(torch.equal(before[n]["weight"], after[n]["weight"]) for n in before)


def test_bad_starts_are_refused_and_change_nothing(
    new_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    folder = run.parent / "run"
    train(run, "train.steps=2", "train.schedule.warmup_steps=0")
    files = contents(folder)
    cases = {
        ("--fresh",): "already holds a run at step 2",
        ("data.sequence_length=8",): "data.sequence_length: was 16, is 8",
        ("data.seed=9",): "data.seed: was 3, is 9",
        ("model.ffn_size=64", "model.sites.c_fc.kind=dense", "model.sites.c_proj={kind='dense'}"):
            "belongs to another model",
        ("model.vocab_size=8",): "model.vocab_size: 8 is smaller than the vocabulary",
    }  # fmt: skip
    for arguments, message in cases.items():
        assert main(["train", str(run), *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
    assert contents(folder) == files
    more = ["train.steps=3", "train.schedule.warmup_steps=0"]
    done = train(run, "data.seed=9", "--allow-data-change", *more)
    assert "data.seed: was 3, is 9" in done.stderr
