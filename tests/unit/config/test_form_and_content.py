"""Mistakes of form and of content come together, and none is the mere consequence of another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cluster import load_cluster
from launcher.sweep_file import load_sweep
from mpotrain.config import RunConfig, load_config
from mpotrain.config_file import validate
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import LayeredTable
from mpotrain.schema import UnsoundKeyError, collect_problems, to_dict
from mpotrain.tune.config import load_tune_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
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
            ["train.steps", "train.optimizer.eps"],
        ),
        (
            ["model.sites.qkv={kind='ttm', rank='a'}", "model.sites.c_fc={kind='ttm', rank=0}"],
            ["model.sites.qkv.rank", "model.sites.c_fc"],
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


def test_a_check_that_cannot_be_made_says_nothing() -> None:
    def unsound() -> Iterator[str]:
        yield "a: half of what is wrong"
        raise UnsoundKeyError("b")

    assert collect_problems(lambda: ["x: 1"], unsound, lambda: ["y: 2"]) == ["x: 1", "y: 2"]


# Any one leaf of whole files is broken, in files with mistakes of content that are known.


@dataclass(frozen=True)
class Planted:
    """A file with mistakes of content.

    Attributes:
        kind: class of the configuration.
        data: the resolved file.
        reads: dotted key of each planted mistake -> sections that its check reads.
        base: all lines about the file as it is.
    """

    kind: type[Any]
    data: dict[str, Any]
    reads: dict[str, set[str]]
    base: frozenset[str]


def lines_of(kind: type[Any], data: dict[str, Any]) -> list[str]:
    """Return the lines about a table, without its source."""
    table = LayeredTable()
    table.merge(copy.deepcopy(data), "x")
    try:
        validate(kind, table)
    except ConfigError as error:
        return [line.removeprefix("x: ") for line in error.problems]
    return []


def planted(whole: object, mistakes: dict[str, Any], reads: dict[str, set[str]]) -> Planted:
    data = copy.deepcopy(to_dict(whole))
    for key, value in mistakes.items():
        *sections, name = key.split(".")
        inner = data
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    own = {key: {key.partition(".")[0]} for key in mistakes if key not in reads}
    own |= {key: sections for key, sections in reads.items() if sections}
    base = frozenset(lines_of(type(whole), data))
    for key in own:
        assert any(line.startswith(key) for line in base), (key, base)
    return Planted(type(whole), data, own, base)


def run_of(name: str) -> RunConfig:
    return load_config(CONFIGS / "runs" / f"{name}.toml")


@cache
def all_planted() -> tuple[Planted, ...]:
    several: dict[str, Any] = {
        "name": " ", "data.seed": -1, "train.clip_norm": -1.0, "train.optimizer.eps": 0.0,
        "checkpoint.every": 0, "parallel.context": 0,
    }  # fmt: skip
    megatron = run_of("gpt2-small-mpoe8-megatron")
    cuts = {"model", "data", "train", "parallel", "engine"}
    tune = load_tune_config(CONFIGS / "tune" / "demo-mrpc.toml")
    cluster = load_cluster(sorted((CONFIGS / "clusters").glob("*.toml"))[0])
    return (
        planted(megatron, several | {"model.num_heads": 5, "engine.bucket_elements": 0}, {}),
        planted(
            megatron,
            {"parallel.tensor": 5, "checkpoint.every": 0, "data.sequence_length": 2048},
            {"parallel.tensor": cuts, "data.sequence_length": {"model", "data"}},
        ),
        planted(
            run_of("mpobert-48"),
            several | {
                "model.norm_eps": 0.0, "model.sharing.groups": 5, "model.adapter.rank": 0,
                "model.pair_head": False, "parallel.tensor": 2,
            },
            {"model.pair_head": {"model", "data"}, "parallel.tensor": {"parallel", "engine"}},
        ),
        planted(
            run_of("t5-base-mpoe8"),
            several | {
                "model.relative_buckets": 3, "model.moe.num_experts": 3, "engine.zero_stage": 3,
                "parallel.expert": 2,
            },
            {
                "model.moe.num_experts": set(), "engine.zero_stage": set(),
                "parallel.expert": {"parallel", "engine", "model"},
            },
        ),
        planted(
            tune,
            {
                "source": "", "dropout": 1.0, "task.train": "", "train.seed": -1,
                "parallel.tensor": 2, "checkpoint.keep_last": 0,
            },
            {"parallel.tensor": {"parallel", "engine"}},
        ),
        planted(
            cluster,
            {
                "nodes": 0, "time": "2", "exclude": "a[", "python": "", "extra": ["x"],
                "lives.max_lives": 0, "environment.RANK": "1", "preflight.min_free_gib": -1.0,
                "lives.worker_restarts": 2, "launcher": "srun",
            },
            {
                "time": {"time", "lives"}, "launcher": set(),
                "lives.worker_restarts": {"lives", "launcher"},
            },
        ),
    )  # fmt: skip


def paths_in(data: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the keys of all sections and leaves below a table."""
    for key, value in data.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from paths_in(value, (*at, key))


def check_broken(file: Planted, path: tuple[str, ...], how: str) -> None:
    """Break one key and hold all lines against those about the file as it was."""
    data = copy.deepcopy(file.data)
    *sections, name = path
    inner = data
    for section in sections:
        inner = inner[section]
    value = inner.pop(name)
    if how == "misspelt":
        inner[f"{name}_x"] = value
    else:
        inner[name] = {"table": {"no_such": 1}, "list": [[]], "date": date(2020, 2, 2)}[how]
    # Another kind of section has other keys.
    broken = ".".join(path[:-1] if name == "kind" else path)

    found = lines_of(file.kind, data)

    form = [line for line in found if line.startswith(broken) and line not in file.base]
    assert form, found
    assert len(set(found)) == len(found)
    assert set(found) - set(form) <= file.base, "a mistake that is the consequence of another"
    hidden = [
        key
        for key, reads in file.reads.items()
        if path[0] not in reads and not any(line.startswith(key) for line in found)
    ]
    assert not hidden


def is_section(value: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        value = value[key]
    return isinstance(value, dict)


def ways(file: Planted, path: tuple[str, ...]) -> list[str]:
    """Return how a key can be broken; a variable may have any name, a section be a table."""
    if path[0] == "environment":
        return ["list", "date"] if path == ("environment",) else ["table", "list"]
    if is_section(file.data, path):
        return ["misspelt", "list", "date"]
    return ["misspelt", "table", "list"]


@st.composite
def breaks(draw: st.DrawFn) -> tuple[Planted, tuple[str, ...], str]:
    file = draw(st.sampled_from(all_planted()))
    path = draw(st.sampled_from(list(paths_in(file.data))))
    return file, path, draw(st.sampled_from(ways(file, path)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(breaks())
def test_one_broken_key_hides_nothing_elsewhere_and_has_no_consequences(
    case: tuple[Planted, tuple[str, ...], str],
) -> None:
    check_broken(*case)
