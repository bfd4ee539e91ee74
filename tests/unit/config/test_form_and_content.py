"""Mistakes of form and of content come together, and none is the mere consequence of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.cluster import load_cluster
from launcher.sweep_file import load_sweep
from mpotrain.config import load_config
from mpotrain.errors import ConfigError
from mpotrain.schema import UnsoundKeyError, collect_problems

RUN = """
extends = ["base.toml"]
name = "t"
folder = "runs/t"

[model]
vocab_size = 64
context_length = 32
hidden_size = 16
num_layers = 1
num_heads = 5
ffn_size = 32

[data]
sources = [{ path = "d" }]
sequence_length = 32
shuffel = false
"""
BASE = """
[train]
steps = "ten"
global_batch_size = 4
micro_batch_size = 2
[train.schedule]
kind = "constant"
lr = 1e-3
"""


def run_files(tmp_path: Path) -> tuple[Path, Path]:
    run, base = tmp_path / "run.toml", tmp_path / "base.toml"
    run.write_text(RUN)
    base.write_text(BASE)
    return run, base


def problems_of(path: Path, *overrides: str) -> list[str]:
    """Return the lines about a run file, without its name."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.partition(": ")[2] for line in caught.value.problems]


def keys_of(load: Callable[[Path], object], tmp_path: Path, lines: list[str]) -> list[str]:
    """Return the dotted keys that are told about a file, in the order of letters."""
    path = tmp_path / "file.toml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        load(path)
    told = [line.removeprefix(f"{path}: ") for line in caught.value.problems]
    return sorted(line.partition(":")[0] for line in told)


def test_mistakes_in_three_sections_come_in_one_message(tmp_path: Path) -> None:
    run, base = run_files(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(run)
    assert caught.value.problems == [
        f"{base}: train.steps: input should be a valid integer, got 'ten'",
        f"{run}: model.num_heads: 5 heads do not divide hidden_size 16",
        f"{run}: data.shuffel: unknown key; did you mean 'shuffle'?",
    ]


def test_lines_stand_in_the_order_of_the_sections_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[checkpoint]\nevery = 0\n[data]\nsources = []\nsequence_length = "x"\nfoo = 1\n'
        "[train]\nsteps = 10\nglobal_batch_size = 4\nmicro_batch_size = 2.5\nclip_norm = -1.0\n"
        '[train.schedule]\nkind = "constant"\nlr = 1e-3\n'
    )
    assert [line.partition(":")[0] for line in problems_of(path)] == [
        "checkpoint.every", "data.sequence_length", "data.foo", "data.sources",
        "train.micro_batch_size", "train.clip_norm", "name", "folder", "model",
    ]  # fmt: skip


def test_content_in_lists_is_told_with_the_file_that_set_them(tmp_path: Path) -> None:
    run, base = run_files(tmp_path)
    base.write_text(BASE.replace('"ten"', "10") + "[data]\nsplit = [0.5, 0.5, 0.0]\n")
    run.write_text(
        RUN.replace("shuffel = false", "").replace("heads = 5", "heads = 2").replace('"d"', '""')
    )
    with pytest.raises(ConfigError) as caught:
        load_config(run)
    (line,) = caught.value.problems
    assert line.startswith(f"{run}: data.sources[0].path: is empty")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # Parts of a section with a mistake that do not need it are checked all the same.
        (
            ["train.steps=ten", "train.optimizer.eps=-1.0", "train.schedule.warmup_steps=-1"],
            ["train.steps", "train.optimizer.eps", "train.schedule.warmup_steps"],
        ),
        (
            ["model.sites.qkv={kind='ttm', rank='a'}", "model.sites.c_fc={kind='ttm', rank=0}"],
            ["model.sites.qkv.rank", "model.sites.c_fc"],
        ),
        (
            ["data.sources=[{path='', wieght=1}, {path='a', weight=-1.0}, 3]"],
            [
                *("data.sources.0.wieght", "data.sources.2"),
                *("data.sources[0].path", "data.sources[1].weight"),
            ],
        ),
        # What a section is told by the one around it may be unsound.
        (
            ["data.sequence_length=x", "data.objective={kind='masked', mask_share=2.0}"],
            ["data.sequence_length", "data.objective.mask_share"],
        ),
        (
            ["model.hidden_size=x", "model.moe={num_experts='x', every=99, router.jitter=2.0}"],
            [
                *("model.hidden_size", "model.moe.num_experts", "model.moe.every"),
                "model.moe.router.jitter",
            ],
        ),
        # Sections are held against each other only where both are sound.
        (["data.sequence_length=64"], ["data.sequence_length"]),
        (["data.sequence_length=64", "model.dropout=no"], ["model.dropout"]),
        (["data.sequence_length=64", "train.steps=no"], ["data.sequence_length", "train.steps"]),
        (["parallel.tensor=2"], ["parallel.tensor"]),
        (["parallel.tensor=2", "engine.kind=local_"], ["engine"]),
        # Of what kind a section is decides what its keys mean.
        (["train.schedule.kind=cosin", "train.schedule.lr=-1.0"], ["train.schedule"]),
        (["train.optimizer={knd='lamb', eps=-1.0}"], ["train.optimizer.knd"]),
        # What was meant by a misspelt key is not held against its default.
        (["parallel.tensor=2", "engine.knd=megatron"], ["engine.knd"]),
        (["parallel.tensor=2", "engin.kind=megatron"], ["engin"]),
        (["parallel.tensor=2", "parallel.expert=0", "engin=1"], ["engin", "parallel.expert"]),
        (["model.dropout=no", "model.num_layers=0"], ["model.num_layers", "model.dropout"]),
        # Nothing is held against a network that cannot exist.
        (
            ["train.central_mask.probability=0.5", "model.sites.c_fc={kind='ttm', rank=0}"],
            ["model.sites.c_fc"],
        ),
        # A table where a number should be.
        (["train.eval_every.a=1", "train.seed=-1"], ["train.eval_every", "train.seed"]),
    ],
)
def test_what_is_told_beside_a_mistake(
    tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    run, base = run_files(tmp_path)
    base.write_text(BASE.replace('"ten"', "10"))
    run.write_text(RUN.replace("heads = 5", "heads = 2").replace("shuffel", "shuffle"))

    found = [line.partition(":")[0] for line in problems_of(run, *overrides)]

    assert sorted(found) == sorted(expected)


def test_an_unknown_key_in_a_stage_of_a_sweep_is_told(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text('folder = " "\n[stages.a]\nrun = "x"\nafer = "b"\n')
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    assert caught.value.problems == [
        f"{path}: folder: is empty",
        f"{path}: stages.a.afer: unknown key; did you mean 'after'?",
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["[lives]", "grace_seconds = 'x'", "warning_seconds = 70000"],
            ["lives.grace_seconds", "lives.warning_seconds"],
        ),
        (
            ["[lives]", "max_lifes = 3", "warning_seconds = 70000"],
            ["lives.max_lifes", "lives.warning_seconds"],
        ),
        (
            ["[container]", "kind = 'apptainer'", "image = ''", "pythn = 'a'"],
            ["container.pythn", "container.image"],
        ),
        (["[environment]", "A = 3", "RANK = '1'"], ["environment.A", "environment.RANK"]),
        (["environment = 3", "nodes = 0"], ["environment", "nodes"]),
        # A container without `kind` is none, but these keys belong to another.
        (["[container]", "image = ''", "pythn = 'a'"], ["container.image", "container.pythn"]),
    ],
)
def test_one_key_of_a_cluster_file_does_not_hide_its_neighbours(
    tmp_path: Path, lines: list[str], expected: list[str]
) -> None:
    assert keys_of(load_cluster, tmp_path, lines) == sorted(expected)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["folder='f'", "run='r'", "nam='x'", "grid.train.seed=[1, 1]"],
            ["nam", "grid.train.seed"],
        ),
        (["folder='f'", "run=1", "grid.train.seed=[1, 1]"], ["run", "grid.train.seed"]),
        (
            ["folder='f'", "[stages.a]", "run='r'", "afer='z'", "[stages.'b c']", "run=''"],
            ["stages.a.afer", "stages.b c", "stages.b c.run"],
        ),
        (
            ["folder='f'", "stages.a=3", "[stages.b]", "run='r'", "after=['a', 'z']"],
            ["stages.a", "stages.b.after"],
        ),
    ],
)
def test_one_key_of_a_sweep_file_does_not_hide_its_neighbours(
    tmp_path: Path, lines: list[str], expected: list[str]
) -> None:
    assert keys_of(load_sweep, tmp_path, lines) == sorted(expected)


@pytest.mark.parametrize(
    ("key", "is_told"),
    [
        ("vocab_sise = 64", True),
        ("foo = 1", True),
        ("kidn = 'encoder'", False),
        ("num_decoder_layers = 2", False),
        ("num_token_typs = 2", False),
    ],
)
def test_an_unknown_key_leaves_a_section_of_the_default_kind_what_it_is(
    tmp_path: Path, key: str, is_told: bool
) -> None:
    run, base = run_files(tmp_path)
    base.write_text(BASE.replace('"ten"', "10"))
    run.write_text(RUN.replace("shuffel", "shuffle").replace("[model]", f"[model]\n{key}"))
    unknown = f"model.{key.partition(' ')[0]}"
    found = [line.partition(":")[0] for line in problems_of(run)]
    assert found == ([unknown, "model.num_heads"] if is_told else [unknown])


def test_a_check_that_cannot_be_made_says_nothing() -> None:
    def unsound() -> Iterator[str]:
        yield "a: half of what is wrong"
        raise UnsoundKeyError("b")

    assert collect_problems(lambda: ["x: 1"], unsound, lambda: ["y: 2"]) == ["x: 1", "y: 2"]
