"""The comparison of mixtures: what is compared, who trains when, and what the table says."""

import json
import math
import statistics
import subprocess
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import comparison
from benchmarks.comparison import Run, train_all
from benchmarks.mixture_results import Figures, markdown_table, summarise
from benchmarks.mixtures import RUN_FILE, VARIANTS
from mpotrain.config import load_config
from mpotrain.errors import EXIT_ANOMALY, MpotrainError
from mpotrain.tensor.experts import ExpertShape, auxiliary_shapes

MODELS = {name: load_config(RUN_FILE, overrides).model for name, overrides in VARIANTS.items()}


def test_variants_have_the_sizes_that_make_them_comparable() -> None:
    total = {name: model.num_parameters() for name, model in MODELS.items()}
    active = {name: model.active_parameters() for name, model in MODELS.items()}
    routers = 4 * 8 * 128
    assert active["switch-8"] == total["dense"] + routers
    assert total["switch-8"] == total["dense"] + routers + 7 * 4 * (2 * 128 * 512 + 512 + 128)
    assert total["asymmetric-8"] == pytest.approx(total["mpoe-8"], rel=2e-3)
    assert total["asymmetric-8-half"] < total["dense"] < total["mpoe-8"] < total["switch-8"] / 3
    assert MODELS["mpoe-8"] == MODELS["mpoe-8-mask0.3"] == MODELS["mpoe-8-mask0.7"]


def test_mpoe_has_the_proportions_of_the_published_shape() -> None:
    """Central tensor over auxiliaries of one expert: 12.77 for 768 x 3072 in five cores."""
    moe = MODELS["mpoe-8"].moe
    assert moe is not None
    for site, shape in ((moe.c_fc, (128, 512)), (moe.c_proj, (512, 128))):
        spec = site.spec(*shape)
        assert spec is not None
        assert spec.num_cores == 5
        central = prod(spec.core_shapes[spec.central_index])
        ratio = central / sum(prod(core) for core in auxiliary_shapes(spec))
        assert ratio == pytest.approx(12.77, rel=0.01)
        assert ExpertShape.of(spec).left_bond > 1


def test_only_masks_and_mixtures_differ() -> None:
    allowed = ("model.moe=", "train.central_mask=")
    assert all(line.startswith(allowed) for lines in VARIANTS.values() for line in lines)


def figures(variant: str, seed: int, loss: float, load: float | None = None) -> Figures:
    return Figures(variant, seed, 10, 5, loss, None, 0.1 * seed, 1, 100, load, load)


def test_differences_are_taken_seed_by_seed() -> None:
    runs = [
        figures("dense", 1, 4.0),
        figures("a", 1, 3.9, 2.0),
        figures("dense", 2, 5.0),
        figures("a", 2, 4.8, 4.0),
        figures("a", 3, 9.0, 6.0),
    ]
    dense, other = summarise(runs)
    assert (dense.variant, dense.loss, dense.difference, dense.largest_load) == (
        "dense",
        4.5,
        0.0,
        None,
    )
    assert dense.loss_std == pytest.approx(statistics.stdev([4.0, 5.0]))
    assert other.num_seeds == 3
    assert other.loss == pytest.approx(5.9)
    assert other.difference == pytest.approx(-0.15)  # seed 3 has no dense twin
    assert other.difference_std == pytest.approx(statistics.stdev([0.1, 0.2]))
    assert (other.seconds_per_step, other.largest_load) == (pytest.approx(0.2), 4.0)


def test_table_of_one_seed_claims_no_deviation() -> None:
    summaries = summarise([figures("dense", 1, 4.0), figures("a", 1, 3.9, 2.0)])
    assert math.isnan(summaries[1].loss_std)
    rows = markdown_table(summaries).splitlines()
    assert rows[2] == "| dense | 10 | 5 | 4.0000 | - | 0.100 | - |"
    assert rows[3] == "| a | 10 | 5 | 3.9000 | -0.1000 | 0.100 | 2.00 x even |"
    two = [figures(name, seed, 4.0 + seed) for name in ("dense", "a") for seed in (1, 2)]
    row = markdown_table(summarise(two)).splitlines()[3]
    assert "5.5000 ± 0.7071 | +0.0000 ± 0.0000" in row


def make_runs(folder: Path, names: list[str]) -> list[Run]:
    return [
        Run(name, 1, RUN_FILE, [], load_config(RUN_FILE, [f'folder="{folder}/runs/{name}"']))
        for name in names
    ]


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Children that only sleep or fail, once there are two; records order and number at a time."""
    seen = SimpleNamespace(started=[], finished=[], processes=[], most=0, codes={})

    def start(run: Run) -> subprocess.Popen[bytes]:
        command = 'until [ -e "$0" ]; do sleep 0.02; done; sleep 0.2; exit "$1"'
        two, code = tmp_path / "two", str(seen.codes.get(run.variant, 0))
        process = subprocess.Popen(["/bin/sh", "-c", command, two, code])
        seen.started.append(run.variant)
        seen.processes.append(process)
        seen.most = max(seen.most, sum(child.poll() is None for child in seen.processes))
        if len(seen.processes) == 2:
            two.touch()
        return process

    def read(name: str, _: object) -> SimpleNamespace:
        seen.finished.append(name)
        return SimpleNamespace(validation_loss=1.0)

    monkeypatch.setattr(comparison, "_start", start)
    monkeypatch.setattr(comparison, "read_variant", read)
    return seen


def test_finished_runs_are_left_alone_and_jobs_are_bounded(
    tmp_path: Path, scheduler: SimpleNamespace
) -> None:
    runs = make_runs(tmp_path, ["a", "b", "c", "d"])
    for name, outcome in (("b", "done"), ("c", "resume")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "outcome.json").write_text(json.dumps({"outcome": outcome, "detail": ""}))
    train_all(runs, 2)
    assert scheduler.started == ["a", "c", "d"]
    assert sorted(scheduler.finished) == ["a", "c", "d"]
    assert scheduler.most == 2


def test_failure_is_that_of_its_own_run_and_ends_the_others(
    tmp_path: Path, scheduler: SimpleNamespace
) -> None:
    scheduler.codes = {"b": EXIT_ANOMALY}
    with pytest.raises(MpotrainError, match=r"b, seed 1 ended with exit code 3; see .*b\.log"):
        train_all(make_runs(tmp_path, ["a", "b", "c", "d"]), 2)
    assert "d" not in scheduler.finished
    assert all(process.poll() is not None for process in scheduler.processes)
