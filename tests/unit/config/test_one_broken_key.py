"""Any one key of whole files is broken, in files with mistakes of content that are known."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cluster import ClusterConfig, load_cluster
from launcher.sweep_file import SweepConfig
from mpotrain.config import RunConfig, config_from_table, load_config
from mpotrain.config_file import validate
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import LayeredTable, read_layers
from mpotrain.schema import to_dict
from mpotrain.tune.config import load_tune_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FREE = {("environment",), ("stages",)}
"""Tables whose names are free."""
SETTINGS = {"fixed", "grid"}
"""Tables that may hold anything."""


@dataclass(frozen=True)
class Planted:
    """A file with mistakes of content.

    Attributes:
        kind: class of the configuration.
        data: the table as a file says it, or the resolved one.
        reads: line of each planted mistake, as it begins -> dotted keys that its check reads (a
            section: all in it).
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
        if kind is RunConfig:
            config_from_table(table)
        else:
            validate(kind, table)
    except ConfigError as error:
        return [line.removeprefix("x: ") for line in error.problems]
    return []


def planted(
    kind: type[Any],
    data: dict[str, Any],
    mistakes: dict[str, Any],
    reads: dict[str, set[str]],
) -> Planted:
    """Write mistakes into a table; what is not in `reads` is checked by its own key alone."""
    data = copy.deepcopy(data)
    for key, value in mistakes.items():
        *sections, name = key.split(".")
        inner = data
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    own = {key: {key} for key in mistakes if key not in reads}
    own |= {key: keys for key, keys in reads.items() if keys}
    base = frozenset(lines_of(kind, data))
    for key in own:
        assert any(line.startswith(key) for line in base), (key, base)
    return Planted(kind, data, own, base)


def resolved(whole: object, mistakes: dict[str, Any], reads: dict[str, set[str]]) -> Planted:
    return planted(type(whole), to_dict(whole), mistakes, reads)


def run_of(name: str) -> RunConfig:
    return load_config(CONFIGS / "runs" / f"{name}.toml")


SEVERAL: dict[str, Any] = {
    "name": " ", "data.seed": -1, "data.split": [0.5, 0.5, 0.5], "train.clip_norm": -1.0,
    "train.log_every": 0, "train.optimizer.eps": 0.0, "train.schedule.lr": -1.0,
    "train.anomaly.window": 1, "checkpoint.keep_last": 0, "parallel.context": 0,
}  # fmt: skip
HEADS = {"model.num_heads", "model.hidden_size"}
CUTS = {"model", "data", "train", "parallel", "engine"}


def planted_runs() -> Iterator[Planted]:
    megatron = run_of("gpt2-small-mpoe8-megatron")
    yield resolved(
        megatron,
        SEVERAL | {"model.num_heads": 5, "engine.bucket_elements": 0},
        {"model.num_heads": HEADS},
    )
    yield resolved(
        megatron,
        {"parallel.tensor": 5, "checkpoint.every": 0, "data.sequence_length": 2048},
        {"parallel.tensor": CUTS, "data.sequence_length": {"model", "data"}},
    )
    yield resolved(
        run_of("mpobert-48"),
        SEVERAL | {
            "model.norm_eps": 0.0, "model.sharing.groups": 5, "model.adapter.rank": 0,
            "model.pair_head": False, "parallel.tensor": 2, "data.objective.mask_share": 2.0,
        },
        {
            "model.sharing.groups": {"model.sharing.groups", "model.num_layers"},
            "model.pair_head": {"model", "data"},
            "parallel.tensor": {"parallel", "engine"},
        },
    )  # fmt: skip
    yield resolved(
        run_of("t5-base-mpoe8"),
        SEVERAL | {
            "model.relative_buckets": 3, "model.moe.num_experts": 3, "engine.zero_stage": 3,
            "parallel.expert": 2, "engine.max_live_elements": -1, "model.moe.every": 99,
            "model.moe.router.jitter": 2.0,
        },
        {
            "model.relative_buckets": {"model.relative_buckets", "model.relative_distance"},
            "model.moe.num_experts": set(), "engine.zero_stage": set(),
            "parallel.expert": {"parallel", "engine", "model"},
            "model.moe.every": {
                "model.moe.every", "model.num_layers", "model.num_decoder_layers",
            },
        },
    )  # fmt: skip
    as_written = read_layers(CONFIGS / "runs" / "gpt2-small-ttm64.toml").data
    del as_written["model"]["kind"], as_written["train"]["optimizer"]["kind"]
    yield planted(
        RunConfig,
        as_written,
        SEVERAL | {"model.num_heads": 5, "engine.reduce_bucket_elements": 0},
        {"model.num_heads": HEADS},
    )


def planted_tune_run() -> Planted:
    return resolved(
        load_tune_config(CONFIGS / "tune" / "demo-mrpc.toml"),
        {
            "source": "", "dropout": 1.0, "task.train": "", "task.max_bad_lines": -1,
            "train.seed": -1, "parallel.tensor": 2, "checkpoint.keep_last": 0,
        },
        {"parallel.tensor": {"parallel", "engine"}},
    )  # fmt: skip


def planted_clusters() -> Iterator[Planted]:
    path = sorted((CONFIGS / "clusters").glob("*.toml"))[0]
    mistakes: dict[str, Any] = {
        "nodes": 0, "exclude": "a[", "python": "", "extra": ["x"], "container.image": "",
        "lives.max_lives": 0, "lives.worker_restarts": 2, "lives.warning_seconds": 70_000,
        "environment.RANK": "1", "environment.OTHER": "1", "environment.A-B": "1",
        "preflight.min_free_gib": -1.0, "launcher": "srun",
    }  # fmt: skip
    reads: dict[str, set[str]] = {
        "launcher": set(),
        "lives.worker_restarts": {"lives", "launcher"},
        "environment.OTHER": set(),
    }
    timed = {"time": "2"}, {"time": {"time", "lives"}}
    yield resolved(load_cluster(path), mistakes | timed[0], reads | timed[1])
    yield planted(ClusterConfig, read_layers(path).data, mistakes, reads)


def planted_sweeps() -> Iterator[Planted]:
    grid: dict[str, Any] = {"train.seed": [1, 1]}
    single = {
        "folder": " ", "run": "r.toml", "fixed": {"train.steps": 3}, "name": "x",
        "grid": grid | {"train.steps": [1]}, "include": [{"name": "x"}],
        "exclude": [{"data.seed": 1}],
    }  # fmt: skip
    of_single = {
        "folder": {"folder"}, "grid.train.seed": {"grid"}, "grid.train.steps": {"grid", "fixed"},
        "include[0].name": {"include"}, "exclude[0].data.seed": {"exclude", "grid"},
    }  # fmt: skip
    yield planted(SweepConfig, single, {}, of_single)
    stages = {
        "a": {"run": "", "grid": grid},
        "b c": {"run": "r.toml", "after": ["z"], "include": [{"folder": "x"}]},
        "d": {"run": "r.toml", "after": ["e"]},
        "e": {"run": "r.toml", "for_each": "d"},
    }
    ring = {f"stages.{stage}.{key}" for stage in "de" for key in ("after", "for_each")}
    of_stages = {
        "folder": {"folder"}, "stages.a.run": {"stages.a.run"},
        "stages.a.grid.train.seed": {"stages.a.grid"}, "stages.b c: ": {"stages.b c.(name)"},
        "stages.b c.after": {"stages.b c.after"}, "stages.d.after": ring,
        "stages.b c.include[0].folder": {"stages.b c.include"}, "stages.e.for_each": ring,
    }  # fmt: skip
    yield planted(SweepConfig, {"folder": "", "stages": stages}, {}, of_stages)


@cache
def all_planted() -> tuple[Planted, ...]:
    return (*planted_runs(), planted_tune_run(), *planted_clusters(), *planted_sweeps())


def paths_in(data: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the keys of all sections and leaves below a table."""
    for key, value in data.items():
        yield (*at, key)
        if isinstance(value, dict) and key not in SETTINGS:
            yield from paths_in(value, (*at, key))


def found_at(data: Any, path: tuple[str, ...]) -> Any:
    """Return what stands at a path; None for nothing."""
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def may_hide(file: Planted, path: tuple[str, ...], how: str, read: str) -> bool:
    """Whether a check has to be silent about a broken key because it reads the key `read`."""
    key = tuple(read.split("."))
    shorter = min(len(path), len(key))
    if path[:shorter] == key[:shorter]:
        return True
    # The misspelt name may have stood for any key of its section that is not set.
    same_section = how == "misspelt" and path[:-1] == key[: len(path) - 1]
    return same_section and found_at(file.data, key[: len(path)]) is None


def check_broken(file: Planted, path: tuple[str, ...], how: str) -> None:
    """Break one key and hold all lines against those about the file as it was."""
    data = copy.deepcopy(file.data)
    *sections, name = path
    inner = data
    for section in sections:
        inner = inner[section]
    if how == "misspelt":
        inner[f"{name}_x"] = inner.pop(name)
    else:
        inner[name] = {"table": {"no_such": 1}, "list": [[]], "date": date(2020, 2, 2)}[how]
    # Another kind of section has other keys.
    at = path[:-1] if name == "kind" else path
    broken = ".".join(at)

    found = lines_of(file.kind, data)

    form = [line for line in found if line.startswith(broken) and line not in file.base]
    assert form, found
    assert len(set(found)) == len(found)
    assert set(found) - set(form) <= file.base, "a mistake that is the consequence of another"
    hidden = [
        key
        for key, reads in file.reads.items()
        if not any(may_hide(file, at, how, read) for read in reads)
        and not any(line.startswith(key) for line in found)
    ]
    assert not hidden, found


def ways(file: Planted, path: tuple[str, ...]) -> list[str]:
    """Return how a key can be broken; a variable may have any name, a section be a table."""
    is_section = isinstance(found_at(file.data, path), dict)
    broken = ["list", "date"] if is_section else ["table", "list"]
    return broken if path in FREE or path[:-1] in FREE else ["misspelt", *broken]


@st.composite
def breaks(draw: st.DrawFn) -> tuple[Planted, tuple[str, ...], str]:
    file = draw(st.sampled_from(all_planted()))
    path = draw(st.sampled_from(list(paths_in(file.data))))
    return file, path, draw(st.sampled_from(ways(file, path)))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(breaks())
def test_one_broken_key_hides_only_what_reads_it_and_has_no_consequences(
    case: tuple[Planted, tuple[str, ...], str],
) -> None:
    check_broken(*case)
