"""Sweeps: from a file to points and their names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_cases import GRID, STAGES, points_of, problems_of

from launcher.sweep_points import plain_name, toml_value
from mpotrain.config import load_config


def test_the_grid_is_a_cross_product(tmp_path: Path) -> None:
    points = points_of(tmp_path, GRID)
    assert [point.name for point in points] == [
        "lr-0.001-seed-1", "lr-0.001-seed-2", "lr-0.0003-seed-1", "lr-0.0003-seed-2",
    ]  # fmt: skip
    run = load_config(points[3].run_file, points[3].overrides)
    assert (run.train.schedule.lr, run.train.seed, run.train.steps) == (3e-4, 2, 60)
    assert (run.name, run.folder) == ("lr-0.0003-seed-2", "runs/sweep/lr-0.0003-seed-2")


def test_inclusions_and_exclusions(tmp_path: Path) -> None:
    more = '[[exclude]]\n"train.seed" = 2\ntrain.schedule.lr = 1e-3\n[[include]]\ntrain.seed = 9\n'
    names = [point.name for point in points_of(tmp_path, GRID + more)]
    assert names == ["lr-0.001-seed-1", "lr-0.0003-seed-1", "lr-0.0003-seed-2", "lr-0.001-seed-9"]
    only = 'run = "run.toml"\nfolder = "x"\n[[include]]\ntrain.seed = 5\n'
    assert [point.name for point in points_of(tmp_path, only)] == ["seed-5"]
    assert [p.name for p in points_of(tmp_path, 'run = "run.toml"\nfolder = "x"\n')] == ["runs"]


def test_a_table_with_a_kind_replaces_the_one_in_the_run_file(tmp_path: Path) -> None:
    text = 'run = "run.toml"\nfolder = "x"\n[grid]\ntrain.optimizer = [\n'
    text += '  { weight_decay = 0.25, kind = "lamb" }, { kind = "adamw", betas = [0.5, 0.6] },\n]\n'
    points = points_of(tmp_path, text)
    assert [point.name for point in points] == ["optimizer-lamb", "optimizer-adamw"]
    first, second = (load_config(p.run_file, p.overrides).train.optimizer for p in points)
    assert (first.kind, first.weight_decay) == ("lamb", 0.25)
    assert (second.kind, second.betas) == ("adamw", (0.5, 0.6))
    text = 'run = "run.toml"\nfolder = "x"\n[fixed.train.optimizer]\n'
    (point,) = points_of(tmp_path, text + 'weight_decay = 0.125\nkind = "lamb"\n')
    optimizer = load_config(point.run_file, point.overrides).train.optimizer
    assert (optimizer.kind, optimizer.weight_decay) == ("lamb", 0.125)


def test_all_mistakes_of_a_file_at_once(tmp_path: Path) -> None:
    text = problems_of(
        tmp_path,
        """\
        run = "run.toml"
        folder = " "
        [fixed]
        train.seed = 1
        folder = "elsewhere"
        [grid]
        train.seed = [1, 1]
        train.steps = 5
        train.log_every = []
        [[exclude]]
        train.stepps = 5
        """,
    )
    for part in (
        "folder: is empty",
        "grid.train.seed: stands in `fixed` as well",
        "grid.train.seed: has a value twice",
        "grid.train.steps: must be a list",
        "grid.train.log_every: must be a list",
        "exclude[0].train.stepps: is not in the grid",
        "fixed.folder: every run has its own",
    ):
        assert part in text
    assert "did you mean 'exclude'" in problems_of(tmp_path, GRID + "[[exclud]]\na = 1\n")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("seed-{train.seed}", "x"), "2 runs are called 'lr-0.001-x'"),
        (("{train.seed}", "{train.sede}"), "'train.sede' is neither in"),
        (("{train.seed}", "{parent.name}"), "'parent.name' is neither in"),
        (("lr-", "l" * 120), "name: must have 1 to 100 characters"),
        (('"run.toml"', '"nowhere.toml"'), "nowhere.toml: cannot be read"),
        (("[fixed]", "[[exclude]]\ntrain.seed = 7\n[fixed]"), "exclude[0]: excludes nothing"),
    ],
)
def test_what_cannot_become_points(tmp_path: Path, change: tuple[str, str], part: str) -> None:
    assert part in problems_of(tmp_path, GRID.replace(*change))


@pytest.mark.parametrize(
    "text", ["../../etc/x", "a b;rm -rf $HOME", ".hidden", "-rf", "näme\n\x1b[2J", "a/b\\c%j"]
)
def test_names_are_safe(text: str) -> None:
    name = plain_name(text)
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+=-")
    assert not name.startswith((".", "-"))


def test_hostile_values_stay_inside_of_the_sweep_folder(tmp_path: Path) -> None:
    text = GRID.replace("train.seed = [1, 2]", 'tag.x = ["../../../up", "$(id)"]').replace(
        "{train.seed}", "{tag.x}"
    )
    points = points_of(tmp_path, text)
    assert {point.folder.parent for point in points} == {Path("runs/sweep")}
    assert points[0].name == "lr-0.001-seed-..-..-..-up"
    assert ".." not in points[0].folder.parts


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(
        st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(VALUES)
def test_values_survive_toml(value: Any) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


def test_stages_wait_for_each_other(tmp_path: Path) -> None:
    points = points_of(tmp_path, STAGES)
    assert [point.stage for point in points][:2] == ["plain", "plain"]
    by_name = {point.name: point for point in points}
    one = by_name["seed-2_seed-6"]
    assert one.parents == (Path("runs/sweep/plain/seed-2"),)
    assert one.folder == Path("runs/sweep/tuned/seed-2_seed-6")
    assert one.settings["tokenizer_of"] == "runs/sweep/plain/seed-2"
    assert len(by_name["report"].parents) == 2


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (('for_each = "plain"', 'for_each = "plian"'), "there is no stage 'plian'"),
        (("[stages.plain]", '[stages.plain]\nafter = ["tuned"]'), "waits for 'plain' itself"),
        (('after = "plain"', 'after = "report"'), "waits for 'report' itself"),
        (("[stages.report]", '[stages."../x"]'), "a stage is named with letters"),
        (('folder = "runs/sweep"', 'folder = "runs/sweep"\nrun = "run.toml"'), "beside `stages`"),
    ],
)
def test_impossible_stages(tmp_path: Path, change: tuple[str, str], part: str) -> None:
    assert part in problems_of(tmp_path, STAGES.replace(*change))
