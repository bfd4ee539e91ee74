import subprocess
import sys

import pytest

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.retention import expired_steps


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"every": 0}, "checkpoint.every"),
        ({"keep_last": 0}, "checkpoint.keep_last"),
        ({"keep_every": -5}, "checkpoint.keep_every"),
        ({"every": 100, "keep_every": 250}, "checkpoint.keep_every"),
    ],
)
def test_impossible_values_are_named(values, key):
    problems = CheckpointConfig(**values).problems("checkpoint")
    assert len(problems) == 1
    assert problems[0].startswith(f"{key}: ")


def test_all_problems_are_reported_together():
    assert len(CheckpointConfig(every=0, keep_last=-1, keep_every=0).problems("c")) == 3


def test_nearest_permanent_interval_is_proposed():
    (line,) = CheckpointConfig(every=100, keep_every=260).problems("c")
    assert "nearest is 300" in line


def test_defaults_are_sound():
    assert CheckpointConfig().problems("c") == []


def expired(steps, complete=None, protected=None, **settings):
    good = set(steps if complete is None else complete)
    config = CheckpointConfig(every=1, **settings)
    return expired_steps(
        sorted(steps, reverse=True), config, is_complete=good.__contains__, protected=protected
    )


def test_newest_are_kept():
    assert expired([10, 20, 30, 40], keep_last=3) == [10]
    assert expired([10, 20], keep_last=3) == []


def test_permanent_steps_are_kept():
    assert expired([10, 20, 30, 40, 50], keep_last=1, keep_every=20) == [30, 10]


def test_damaged_checkpoints_do_not_push_the_good_one_out():
    assert expired([10, 20, 30, 40], complete=[10], keep_last=1) == []
    assert expired([10, 20, 30, 40], complete=[10, 20], keep_last=1) == [10]


def test_protected_step_stays_even_when_others_are_newer():
    assert expired([6, 10, 15], protected=6, keep_last=1) == [10]


def test_torch_free_modules_do_not_import_torch():
    modules = ["config", "manifest", "manifest_file", "compare", "folders", "lock", "verify"]
    modules += ["publish", "retention"]
    lines = [f"import mpotrain.checkpoint.{name}" for name in modules]
    code = "\n".join([*lines, "import sys", "assert 'torch' not in sys.modules"])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
