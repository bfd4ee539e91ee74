"""Metrics files, throughput by a scripted clock, and memory."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpotrain.errors import StorageError
from mpotrain.train.journal import read_metrics
from mpotrain.train.metrics import MetricsWriter, Throughput, peak_memory


def scalars(run_folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(run_folder / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_lines_and_scalars_are_the_same_numbers(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, is_main=True, tensorboard=True, now=lambda: 5.0)
    writer.write(1, {"loss": 2.5, "grad_norm_by_role": {"central": 0.25}, "reason": "x"})
    writer.write(1, {"loss": 3.5, "absent": None, "spectrum": [1.0, 0.5]}, kind="eval")
    writer.flush()
    assert read_metrics(tmp_path) == [
        {
            "step": 1,
            "kind": "train",
            "time": 5.0,
            "loss": 2.5,
            "grad_norm_by_role": {"central": 0.25},
            "reason": "x",
        },
        {"step": 1, "kind": "eval", "time": 5.0, "loss": 3.5, "spectrum": [1.0, 0.5]},
    ]
    assert scalars(tmp_path, "train/loss") == [(1, 2.5)]
    assert scalars(tmp_path, "train/grad_norm_by_role/central") == [(1, 0.25)]
    assert scalars(tmp_path, "eval/loss") == [(1, 3.5)]
    writer.close()
    writer.close()


def test_histograms_keep_one_bin_for_each_number(tmp_path: Path) -> None:
    """Bin n is drawn around n, also where the first and last bins are empty."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    writer = MetricsWriter(tmp_path, is_main=True, tensorboard=True)
    loads = {"a/load": [0.0, 5.0, 0.0, 2.0, 0.0], "empty": [0.0, 0.0]}
    writer.write(3, {"x": 1.0}, kind="router", histograms=loads)
    writer.close()
    reader = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    (event,) = reader.Histograms("router/a/load")
    histogram = event.histogram_value
    assert (event.step, histogram.num, histogram.sum, histogram.sum_squares) == (3, 7, 11, 23)
    assert (histogram.min, histogram.max) == (0.5, 3.5)
    assert histogram.bucket_limit == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert histogram.bucket == [0.0, 5.0, 0.0, 2.0, 0.0]
    assert reader.Histograms("router/empty")[0].histogram_value.num == 0
    (line,) = read_metrics(tmp_path)
    assert line.keys() == {"step", "kind", "time", "x"}


def test_resume_has_every_step_once_in_both(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, is_main=True, tensorboard=True)
    for step in range(1, 9):
        first.write(step, {"loss": 100.0 + step})
    first.flush()  # and then the process dies without close()
    second = MetricsWriter(tmp_path, is_main=True, tensorboard=True, resume_step=5)
    assert second.num_dropped == 3
    for step in range(6, 11):
        second.write(step, {"loss": 200.0 + step})
    second.close()
    expected = [(s, (100.0 if s <= 5 else 200.0) + s) for s in range(1, 11)]
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == expected
    assert scalars(tmp_path, "train/loss") == expected
    first.close()


def test_nonfinite_metrics_are_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, is_main=True, tensorboard=False)
    writer.write(1, {"loss": math.nan})
    writer.close()
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])
    assert not (tmp_path / "tensorboard").exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    writer = MetricsWriter(folder, is_main=False, tensorboard=True)
    writer.write(1, {"loss": 1.0})
    writer.flush()
    writer.close()
    assert writer.num_dropped == 0
    assert not folder.exists()


def test_names_of_the_line_itself_are_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, is_main=True, tensorboard=False)
    with pytest.raises(ValueError, match="step"):
        writer.write(1, {"step": 3})
    writer.close()


def test_unwritable_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be created"):
        MetricsWriter(tmp_path / "file" / "run", is_main=True, tensorboard=False)


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


GRID = list(itertools.product([1, 4, 8], [1, 2, 4], [0, 2], [0.0, 7.0], [0.0, 0.3]))


@pytest.mark.parametrize(("accumulation", "world", "warmup", "pause", "masked"), GRID)
def test_throughput_equals_the_hand_formula(
    accumulation: int, world: int, warmup: int, pause: float, masked: float
) -> None:
    """T16: tokens that count, over all ranks, per second of the loop without its pauses."""
    sequences, length, seconds, data_wait = 3, 40, 0.5, 0.125
    per_step = int(accumulation * world * sequences * length * (1 - masked))
    clock = Clock()
    clock.now += 11.0  # time before the loop
    meter = Throughput(
        flops_per_token=2e6, peak_flops=1e9 * world, warmup_steps=warmup, clock=clock
    )
    for step in range(10):
        clock.now += data_wait
        clock.now += seconds * (20 if step < warmup else 1)
        meter.step_done(per_step)
        if step % 3 == 2:
            with meter.excluded():
                clock.now += pause / 2
                with meter.excluded():
                    clock.now += pause / 2
    rate = meter.take()
    assert rate is not None
    expected = per_step / (seconds + data_wait)
    assert rate.num_steps == 10 - warmup
    assert rate.num_tokens == per_step * (10 - warmup)
    assert rate.tokens_per_second == pytest.approx(expected, rel=1e-9)
    assert rate.seconds_per_step == pytest.approx(seconds + data_wait, rel=1e-9)
    assert rate.mfu == pytest.approx(expected * 2e6 / (1e9 * world), rel=1e-9)


def test_pause_inside_a_step_and_by_an_error_is_excluded() -> None:
    clock = Clock()
    meter = Throughput(warmup_steps=0, clock=clock)
    clock.now += 1.0

    def fail() -> None:
        with meter.excluded():
            clock.now += 100.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.now += 1.0
    meter.step_done(10)
    rate = meter.take()
    assert rate is not None
    assert rate.seconds == pytest.approx(2.0)
    assert rate.mfu is None


def test_intervals_begin_anew_and_the_total_goes_on() -> None:
    clock = Clock()
    meter = Throughput(warmup_steps=1, clock=clock)
    assert meter.take() is None
    for seconds, tokens in ((9.0, 1), (1.0, 100), (2.0, 100)):
        clock.now += seconds
        meter.step_done(tokens)
    first = meter.take()
    assert first is not None
    assert (first.num_tokens, first.seconds) == (200, pytest.approx(3.0))
    assert meter.take() is None
    clock.now += 1.0
    meter.step_done(300)
    second = meter.take()
    assert second is not None
    assert (second.num_tokens, second.seconds) == (300, pytest.approx(1.0))
    total = meter.total
    assert total is not None
    assert (total.num_steps, total.num_tokens, total.seconds) == (3, 500, pytest.approx(4.0))


MEMORY = """
import torch
from mpotrain.train.metrics import peak_memory
cpu = torch.device("cpu")
before = peak_memory(cpu)
block = torch.ones(25_000_000)
inside = peak_memory(cpu)
del block
after = peak_memory(cpu)
print(inside - before, after - inside, before)
"""


def test_peak_memory_sees_a_block_and_keeps_its_peak() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    grown, later, before = map(int, done.stdout.split())
    assert 85e6 < grown < 130e6
    assert abs(later) < 20e6  # the kernel counts pages a little loosely
    assert before > 50e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_cuda() -> None:
    device = torch.device("cuda")
    before = peak_memory(device)
    torch.empty(before + 2**28, dtype=torch.uint8, device=device)
    assert peak_memory(device) >= before + 2**28
