"""The sweep file: many runs of one run file, as a cross product of settings, in stages.

    run = "../runs/demo.toml"
    folder = "runs/lr-sweep"
    name = "lr-{train.schedule.lr}-seed-{train.seed}"
    [fixed]
    train.steps = 200
    [grid]
    train.schedule.lr = [1e-3, 3e-4]
    train.seed = [1, 2]

It is read like a run file: `extends`, strict, every mistake at once with file and dotted key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from launcher.commands import Task
from mpotrain.config_file import validate
from mpotrain.layered_toml import LayeredTable, read_layers
from mpotrain.schema import collect_problems, config

SINGLE_STAGE = "runs"
"""Name of the only stage of a sweep file without `stages`."""
_STAGE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
_DOTTED_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

_NO_RUN = "run: is not set; name a run file, or write [stages.NAME] tables"

Settings = dict[str, Any]
"""Dotted keys with their values; a table with a `kind` is a value."""


@config
class StageConfig:
    """Runs of one run file."""

    run: str
    """Run file, relative to the sweep file."""
    name: str | None = None
    """Name of each run and of its folder: text with `{dotted.key}` for settings and, where
    `for_each` is set, `{parent.name}`. Absent: the keys of the grid with their values."""
    task: Task = "train"
    """What the run file is of: "train" (pretraining) or "tune"."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs, laid over the run file."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Lists of values by dotted key; there is a run for each combination."""
    include: tuple[dict[str, Any], ...] = ()
    """Further runs, each with its settings."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations of the grid that are left out: those that have all of these values."""
    after: tuple[str, ...] = ()
    """Stages all of whose runs must be done before a run of this one starts."""
    for_each: str | None = None
    """Stage for each of whose runs this one has its runs; each starts when that one is done.
    `{parent.folder}` and `{parent.name}` in text settings stand for it."""

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the stage, one line each.

        Args:
            where: dotted key of this section, empty for the file itself.
        """
        return _stage_problems(self, f"{where}." if where else "")


@config
class SweepConfig:
    """A sweep: the keys of one stage at the top, or several stages."""

    folder: str
    """Folder of the sweep; run folders are made in it (in one for each stage if there are
    `stages`). Relative to where the command is given, like the folder in a run file."""
    run: str | None = None
    """See `StageConfig`, as for all keys that follow; absent where there are `stages`."""
    name: str | None = None
    """Name of each run."""
    task: Task = "train"
    """What the run file is of."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Lists of values by dotted key."""
    include: tuple[dict[str, Any], ...] = ()
    """Further runs."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations to leave out."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stages by name, where the runs of some wait for those of others."""

    def all_stages(self) -> dict[str, StageConfig]:
        """Return the stages by name, the single one included."""
        if self.run is None:
            return self.stages
        single = StageConfig(
            run=self.run,
            name=self.name,
            task=self.task,
            fixed=self.fixed,
            grid=self.grid,
            include=self.include,
            exclude=self.exclude,
        )
        return {SINGLE_STAGE: single}

    def problems(self) -> list[str]:
        """Return everything wrong with the file, one line each, beginning with the dotted key."""
        taken = ("run", "name", "fixed", "grid", "include", "exclude")
        return collect_problems(
            lambda: [] if self.folder.strip() else ["folder: is empty"],
            lambda: [] if self.run is not None or self.stages else [_NO_RUN],
            lambda: _stage_problems(self, ""),
            *(partial(self._beside_problems, key) for key in taken),
            lambda: collect_problems(
                *(partial(self._named_problems, name) for name in self.stages)
            ),
        )

    def _beside_problems(self, key: str) -> list[str]:
        if not self.stages or not getattr(self, key):
            return []
        return [f"{key}: stands beside `stages`; move it into a stage"]

    def _named_problems(self, name: str) -> list[str]:
        where = f"stages.{name}"

        def naming() -> Iterator[str]:
            if _STAGE_NAME.fullmatch(name) is None:
                yield f"{where}: a stage is named with letters, digits, `_`, `-` and `.`"

        return collect_problems(
            naming,
            lambda: self.stages[name].problems(where),
            lambda: collect_problems(
                *(partial(self._order_problems, name, other) for other in self.stages[name].after)
            ),
            lambda: self._order_problems(name, self.stages[name].for_each, "for_each"),
        )

    def _order_problems(self, name: str, other: str | None, key: str = "after") -> list[str]:
        where = f"stages.{name}.{key}"
        if other is None:
            return []
        if other not in self.stages:
            return [f"{where}: there is no stage {other!r}; known: {', '.join(self.stages)}"]
        if self._reaches(other, name):
            return [f"{where}: {other!r} waits for {name!r} itself: neither would start"]
        return []

    def _reaches(self, start: str, goal: str) -> bool:
        """Whether stage `start` is `goal`, or waits for it through others."""
        seen, front = set(), [start]
        while front:
            name = front.pop()
            if name == goal:
                return True
            if name in self.stages and name not in seen:
                seen.add(name)
                front += waits_for(self.stages[name])
        return False


@dataclass(frozen=True)
class SweepFile:
    """A sweep file that was read.

    Attributes:
        path: the file.
        sweep: its content.
    """

    path: Path
    sweep: SweepConfig

    def stages_in_order(self) -> Iterator[tuple[str, StageConfig]]:
        """Yield stages so that each comes after those that it waits for."""
        stages, done = self.sweep.all_stages(), set[str]()
        while len(done) < len(stages):
            for name, stage in stages.items():
                if name not in done and done.issuperset(waits_for(stage)):
                    done.add(name)
                    yield name, stage

    def run_file(self, stage: StageConfig) -> Path:
        """Return the run file of a stage."""
        return self.path.parent / stage.run


def waits_for(stage: StageConfig) -> list[str]:
    """Return the names of the stages that a stage waits for."""
    return [*stage.after, *([stage.for_each] if stage.for_each is not None else [])]


def load_sweep(path: Path) -> SweepFile:
    """Read and validate a sweep file.

    Args:
        path: TOML file; may extend others.

    Raises:
        ConfigError: with every mistake, each with its file and dotted key.
    """
    table = read_layers(path)
    return SweepFile(path, validate(SweepConfig, _with_lists(table)))


def flat(settings: Mapping[str, Any], at: str = "") -> Settings:
    """Return nested tables as dotted keys.

    Args:
        settings: tables and values; keys may be dotted (`"train.seed"`) or nested.
        at: key of `settings` itself, with a point behind it.
    """
    found: Settings = {}
    for key, value in settings.items():
        # Part of a table of another kind could not be laid over the one in the run file.
        if isinstance(value, Mapping) and value and "kind" not in value:
            found |= flat(value, f"{at}{key}.")
        else:
            found[f"{at}{key}"] = value
    return found


def _stage_problems(stage: StageConfig | SweepConfig, prefix: str) -> list[str]:
    """Return what is wrong with the runs of a stage; `prefix` stands before the keys."""
    return collect_problems(
        partial(_file_problems, stage, prefix),
        *(partial(_table_problems, stage, prefix, section) for section in ("fixed", "grid")),
        *(partial(_list_problems, stage, prefix, section) for section in ("include", "exclude")),
        partial(_twice_problems, stage, prefix),
        partial(_value_problems, stage, prefix),
        partial(_exclude_problems, stage, prefix),
    )


def _file_problems(stage: StageConfig | SweepConfig, prefix: str) -> list[str]:
    return [] if stage.run is None or stage.run.strip() else [f"{prefix}run: is empty"]


def _table_problems(stage: StageConfig | SweepConfig, prefix: str, section: str) -> list[str]:
    return _key_problems(getattr(stage, section), f"{prefix}{section}")


def _list_problems(stage: StageConfig | SweepConfig, prefix: str, section: str) -> Iterator[str]:
    for index, settings in enumerate(getattr(stage, section)):
        yield from _key_problems(settings, f"{prefix}{section}[{index}]")


def _twice_problems(stage: StageConfig | SweepConfig, prefix: str) -> Iterator[str]:
    for key in sorted(flat(stage.fixed).keys() & flat(stage.grid).keys()):
        yield f"{prefix}grid.{key}: stands in `fixed` as well; choose one"


def _value_problems(stage: StageConfig | SweepConfig, prefix: str) -> Iterator[str]:
    for key, values in flat(stage.grid).items():
        if not isinstance(values, list) or not values:
            yield f"{prefix}grid.{key}: must be a list of values, is {values!r}"
        elif len(values) > len({repr(value) for value in values}):
            yield f"{prefix}grid.{key}: has a value twice"


def _exclude_problems(stage: StageConfig | SweepConfig, prefix: str) -> Iterator[str]:
    grid = flat(stage.grid)
    for index, item in enumerate(stage.exclude):
        for key in sorted(flat(item).keys() - grid.keys()):
            yield f"{prefix}exclude[{index}].{key}: is not in the grid"


def _key_problems(settings: Mapping[str, Any], where: str) -> list[str]:
    found = []
    for key in flat(settings):
        if _DOTTED_KEY.fullmatch(key) is None:
            found.append(f"{where}.{key}: is no dotted key such as train.seed")
        elif key in ("name", "folder"):
            found.append(f"{where}.{key}: every run has its own; see `name` and `folder` above")
    return found


def _with_lists(table: LayeredTable) -> LayeredTable:
    """Let a single stage stand where a list of stages may (`after = "pretrain"`)."""
    stages = table.data.get("stages")
    for stage in stages.values() if isinstance(stages, dict) else ():
        if isinstance(stage, dict) and isinstance(stage.get("after"), str):
            stage["after"] = [stage["after"]]
    return table
