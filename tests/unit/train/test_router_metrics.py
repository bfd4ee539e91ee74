"""What is reported of routers, by hand and through the training loop."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpotrain.batch import Batch
from mpotrain.engine.base import StepResult
from mpotrain.train.anomaly import AnomalyGuard
from mpotrain.train.config import AnomalyConfig, ConstantConfig, TrainConfig
from mpotrain.train.journal import read_metrics
from mpotrain.train.loop import LoopParts, TrainingLoop
from mpotrain.train.metrics import MetricsWriter, Throughput
from mpotrain.train.profiler import StepProfiler
from mpotrain.train.progress import Progress
from mpotrain.train.router_metrics import load_histograms, router_metrics
from mpotrain.train.signals import StopRequest
from mpotrain.train.state import Outcome, RunState

NAMES = ("blocks.1.ffn", "blocks.3.ffn")


def statistics(scale: float = 1.0) -> dict[str, Tensor]:
    """Sums of 40 tokens with two choices each, over two mixtures of four experts."""
    rows = {
        "expert_tokens": [[40.0, 20.0, 20.0, 0.0], [20.0, 20.0, 20.0, 20.0]],
        "dropped": [8.0, 0.0],
        "routed": [80.0, 80.0],
        "balance_loss": [60.0, 40.0],
        "z_loss": [4.0, 8.0],
        "router_entropy": [10.0, 50.0],
        "tokens": [40.0, 40.0],
    }
    return {key: scale * torch.tensor(row, dtype=torch.float64) for key, row in rows.items()}


def test_figures_of_each_mixture_and_their_mean() -> None:
    assert router_metrics(statistics(), NAMES) == {
        "mean": {
            "max_over_mean": 1.5,
            "dropped_share": 0.05,
            "balance_loss": 1.25,
            "z_loss": pytest.approx(0.15),
            "entropy": 0.75,
            "idle_experts": 0.5,
        },
        "blocks.1.ffn": {
            "load": [0.5, 0.25, 0.25, 0.0],
            "max_over_mean": 2.0,
            "dropped_share": 0.1,
            "balance_loss": 1.5,
            "z_loss": 0.1,
            "entropy": 0.25,
            "idle_experts": 1.0,
        },
        "blocks.3.ffn": {
            "load": [0.25, 0.25, 0.25, 0.25],
            "max_over_mean": 1.0,
            "dropped_share": 0.0,
            "balance_loss": 1.0,
            "z_loss": 0.2,
            "entropy": 1.25,
            "idle_experts": 0.0,
        },
    }


def test_figures_do_not_depend_on_the_number_of_micro_batches() -> None:
    """Sums of a larger batch with the same routing give the same figures."""
    assert router_metrics(statistics(16.0), NAMES) == router_metrics(statistics(), NAMES)


def test_step_without_tokens_still_has_figures() -> None:
    found = router_metrics(statistics(0.0), NAMES)
    assert found["blocks.1.ffn"]["load"] == [0.0] * 4
    assert found["mean"]["idle_experts"] == 4.0


def test_histograms_are_the_counts() -> None:
    assert load_histograms(statistics(), NAMES) == {
        "blocks.1.ffn/load": [40.0, 20.0, 20.0, 0.0],
        "blocks.3.ffn/load": [20.0] * 4,
    }


def test_wrong_number_of_names_is_refused() -> None:
    for function in (router_metrics, load_histograms):
        with pytest.raises(ValueError, match=r"1 names .* for 2 mixtures"):
            function(statistics(), NAMES[:1])


class RoutedEngine:
    """An engine whose steps return statistics; step 3 is skipped and has none."""

    def __init__(self, with_statistics: bool) -> None:
        self.with_statistics = with_statistics
        self.world = SimpleNamespace(
            agree=lambda value: value, is_main=True, device=torch.device("cpu")
        )

    def step(self, microbatches: Sequence[Batch], *, step: int, **_: Any) -> StepResult:
        sums: Mapping[str, Tensor] = statistics() if self.with_statistics and step != 3 else {}
        return StepResult(1.0, 1.0, None, 40, step == 3, "loss" if step == 3 else None, sums)


def run_loop(folder: Path, names: Sequence[str], with_statistics: bool) -> list[dict[str, Any]]:
    config = TrainConfig(
        steps=5,
        global_batch_size=2,
        micro_batch_size=2,
        schedule=ConstantConfig(lr=1e-3),
        log_every=2,
    )
    metrics = MetricsWriter(folder, is_main=True, tensorboard=True)
    parts = LoopParts(
        engine=RoutedEngine(with_statistics),  # type: ignore[arg-type]
        microbatches=lambda _: [],
        guard=AnomalyGuard(AnomalyConfig()),
        metrics=metrics,
        progress=Progress(5, is_main=False, every=2),
        throughput=Throughput(),
        stop=StopRequest(folder, time_limit_seconds=None, watch_file=False),
        profiler=StepProfiler(None, folder, rank=0, device=torch.device("cpu")),
        save=lambda _: None,
        evaluate=None,
        spectra=nullcontext,  # type: ignore[arg-type]
        bytes_per_token=None,
        mixtures=names,
    )
    outcome, _ = TrainingLoop(config, 100, parts).run(RunState())
    metrics.close()
    assert outcome is Outcome.DONE
    return read_metrics(folder)


def test_loop_writes_routers_where_it_logs(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    lines = run_loop(tmp_path, NAMES, with_statistics=True)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 5]
    routers = [line for line in lines if line["kind"] == "router"]
    assert [line["step"] for line in routers] == [2, 5]  # step 4 was skipped and has no sums
    expected = router_metrics(statistics(), NAMES)
    assert {key: routers[0][key] for key in expected} == expected
    reader = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    (first, last) = reader.Scalars("router/blocks.1.ffn/dropped_share")
    assert (first.step, last.step, first.value) == (2, 5, pytest.approx(0.1))
    assert reader.Scalars("router/mean/max_over_mean")[0].value == 1.5
    histogram = reader.Histograms("router/blocks.1.ffn/load")[0].histogram_value
    assert histogram.bucket == [40.0, 20.0, 20.0, 0.0]


@pytest.mark.parametrize(("names", "with_statistics"), [((), True), (NAMES, False)])
def test_loop_without_mixtures_writes_no_routers(
    tmp_path: Path, names: Sequence[str], with_statistics: bool
) -> None:
    lines = run_loop(tmp_path, names, with_statistics)
    assert {line["kind"] for line in lines} == {"train"}
