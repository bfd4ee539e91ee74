"""The training section: what pydantic accepts, and every problem it names."""

import dataclasses
import json
import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from mpotrain.engine.config import CentralMaskConfig
from mpotrain.schema import to_dict
from mpotrain.train.config import (
    AdamWConfig,
    AnomalyConfig,
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    ProfileConfig,
    TrainConfig,
    WSDConfig,
)

GOOD = TrainConfig(
    steps=100,
    global_batch_size=8,
    micro_batch_size=2,
    schedule=CosineConfig(lr=1e-3, warmup_steps=10),
)


def parse(**entries: object) -> TrainConfig:
    base = {
        "steps": 100,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "schedule": {"kind": "constant", "lr": 1e-3},
    }
    return TypeAdapter(TrainConfig).validate_json(json.dumps(base | entries))


def test_good_config_has_no_problems_and_survives_a_round_trip() -> None:
    assert GOOD.problems("train") == []
    again = TypeAdapter(TrainConfig).validate_json(json.dumps(to_dict(GOOD)))
    assert again == GOOD


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"kind": "cosine", "lr": 1.0}, CosineConfig(lr=1.0)),
        ({"kind": "linear", "lr": 1.0, "decay_steps": 5}, LinearConfig(lr=1.0, decay_steps=5)),
        ({"kind": "wsd", "lr": 1.0, "decay_steps": 5}, WSDConfig(lr=1.0, decay_steps=5)),
        ({"kind": "constant", "lr": 1.0}, ConstantConfig(lr=1.0)),
    ],
)
def test_kind_chooses_the_schedule(entry: dict[str, object], expected: object) -> None:
    assert parse(schedule=entry).schedule == expected


def test_central_mask_is_off_unless_asked_for() -> None:
    assert GOOD.central_mask == CentralMaskConfig(probability=0.0, granularity="step")
    asked = parse(central_mask={"probability": 0.3, "granularity": "element"}).central_mask
    assert (asked.probability, asked.granularity) == (0.3, "element")
    with pytest.raises(ValidationError):
        parse(central_mask={"probability": 0.3, "granularity": "row"})


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "cosine", "lr": 1.0, "decay_shape": "sqrt"},
        {"kind": "constant", "lr": 1.0, "min_lr_ratio": 0.1},
        {"kind": "wsd", "lr": 1.0},
        {"kind": "stairs", "lr": 1.0},
        {"kind": "constant", "lr": "1.0"},
    ],
)
def test_unknown_key_kind_and_wrong_type_are_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        parse(schedule=entry)


# One wrong value each, and the beginning of the one line that must come.
MISTAKES = [
    ({"steps": 0}, "t.steps: must be at least 1, is 0"),
    ({"global_batch_size": 7}, "t.micro_batch_size: 2 does not divide global_batch_size 7"),
    ({"log_every": 0}, "t.log_every:"),
    ({"eval_every": 0}, "t.eval_every:"),
    ({"eval_sequences": 0}, "t.eval_sequences:"),
    ({"spectra_every": -1}, "t.spectra_every:"),
    ({"seed": -1}, "t.seed:"),
    ({"seed": 2**31}, "t.seed:"),
    ({"clip_norm": -0.5}, "t.clip_norm:"),
    ({"time_limit_minutes": -1.0}, "t.time_limit_minutes:"),
    ({"optimizer": AdamWConfig(betas=(0.9, 1.0))}, "t.optimizer.betas:"),
    ({"optimizer": AdamWConfig(eps=0.0)}, "t.optimizer.eps:"),
    ({"optimizer": AdamWConfig(weight_decay=-0.1)}, "t.optimizer.weight_decay:"),
    ({"optimizer": AdamWConfig(core_weight_decay=-0.1)}, "t.optimizer.core_weight_decay:"),
    ({"optimizer": AdamWConfig(core_lr_factor=0.0)}, "t.optimizer.core_lr_factor:"),
    ({"central_mask": CentralMaskConfig(probability=1.5)}, "t.central_mask.probability:"),
    ({"central_mask": CentralMaskConfig(probability=-0.1)}, "t.central_mask.probability:"),
    ({"schedule": ConstantConfig(lr=0.0)}, "t.schedule.lr:"),
    (
        {"schedule": CosineConfig(lr=1.0, warmup_steps=101)},
        "t.schedule.warmup_steps: 101 steps of warm-up, but the run has only 100 steps",
    ),
    ({"schedule": LinearConfig(lr=1.0, warmup_steps=-1)}, "t.schedule.warmup_steps:"),
    ({"schedule": CosineConfig(lr=1.0, min_lr_ratio=1.5)}, "t.schedule.min_lr_ratio:"),
    ({"schedule": LinearConfig(lr=1.0, decay_steps=0)}, "t.schedule.decay_steps:"),
    (
        {"schedule": WSDConfig(lr=1.0, warmup_steps=50, decay_steps=51)},
        "t.schedule.decay_steps: warm-up (50) and decay (51) do not fit into 100 steps",
    ),
    ({"hang_timeout_minutes": -1.0}, "t.hang_timeout_minutes: must be in [0, 10080), is -1.0"),
    ({"hang_timeout_minutes": float("nan")}, "t.hang_timeout_minutes:"),
    ({"hang_timeout_minutes": float("inf")}, "t.hang_timeout_minutes:"),
    ({"anomaly": AnomalyConfig(spike_threshold=0.0)}, "t.anomaly.spike_threshold:"),
    ({"anomaly": AnomalyConfig(grad_norm_threshold=-1.0)}, "t.anomaly.grad_norm_threshold:"),
    ({"anomaly": AnomalyConfig(window=3)}, "t.anomaly.window:"),
    ({"anomaly": AnomalyConfig(max_skips=0)}, "t.anomaly.max_skips:"),
    ({"profile": ProfileConfig(start_step=-1)}, "t.profile.start_step:"),
    ({"profile": ProfileConfig(num_steps=0)}, "t.profile.num_steps:"),
    ({"profile": ProfileConfig(start_step=98, num_steps=3)}, "t.profile.start_step: steps 98 to"),
]


@pytest.mark.parametrize(("change", "beginning"), MISTAKES)
def test_each_mistake_is_one_line_with_its_key(change: dict[str, object], beginning: str) -> None:
    found = dataclasses.replace(GOOD, **change).problems("t")  # type: ignore[arg-type]
    assert len(found) == 1
    assert found[0].startswith(beginning)


def test_limits_themselves_are_allowed() -> None:
    edge = dataclasses.replace(
        GOOD,
        seed=2**31 - 1,
        central_mask=CentralMaskConfig(probability=1.0),
        schedule=WSDConfig(lr=1.0, warmup_steps=50, decay_steps=50, min_lr_ratio=1.0),
        profile=ProfileConfig(start_step=97, num_steps=3),
        anomaly=AnomalyConfig(window=4, max_skips=1),
    )
    assert edge.problems("t") == []


def test_no_minutes_are_no_watchdog() -> None:
    assert GOOD.hang_timeout_seconds == 20 * 60
    assert dataclasses.replace(GOOD, hang_timeout_minutes=0.0).hang_timeout_seconds is None
    assert dataclasses.replace(GOOD, hang_timeout_minutes=0.0).problems("t") == []


def test_all_problems_come_at_once() -> None:
    bad = dataclasses.replace(
        GOOD,
        steps=0,
        clip_norm=-1.0,
        optimizer=AdamWConfig(eps=0.0, betas=(-0.1, 1.0)),
        schedule=ConstantConfig(lr=-1.0),
    )
    assert [line.split(":")[0] for line in bad.problems("train")] == [
        "train.steps",
        "train.clip_norm",
        "train.optimizer.betas",
        "train.optimizer.betas",
        "train.optimizer.eps",
        "train.schedule.lr",
    ]


def test_torch_free_modules_do_not_import_torch() -> None:
    names = ("config", "schedule", "signals", "journal", "anomaly", "progress")
    imports = "; ".join(f"import mpotrain.train.{name}" for name in names)
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
