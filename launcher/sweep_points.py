"""From a sweep file to its points: settings, name and folder of every run (no SLURM)."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.commands import Task
from launcher.sweep_file import Settings, StageConfig, SweepFile, flat
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import read_layers

MAX_POINTS = 10_000
"""Points of a sweep; more is a slip of the pen."""
MAX_NAME = 100
"""Characters of the name of a point."""
_FIELD = re.compile(r"\{([^{}]*)\}")
_PARENT = re.compile(r"\{parent\.(folder|name)\}")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep.

    Attributes:
        stage: name of its stage.
        name: of the run and of its folder; the only one of its stage.
        folder: run folder.
        run_file: the file of the run.
        task: what the run does.
        settings: laid over the run file, by dotted key.
        origins: where each setting stands, by dotted key: sweep file, stage and section.
        parents: run folders of the points that must be done before this one starts.
    """

    stage: str
    name: str
    folder: Path
    run_file: Path
    task: Task
    settings: Mapping[str, Any]
    origins: Mapping[str, str] = field(default_factory=dict)
    parents: tuple[Path, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        """The settings, name and folder as `dotted.key=value` lines."""
        own = {**self.settings, "name": self.name, "folder": str(self.folder)}
        return tuple(f"{key}={toml_value(value)}" for key, value in own.items())


def expand(file: SweepFile) -> list[Point]:
    """Return all points of a sweep, each after those that it waits for.

    Args:
        file: the sweep file.

    Raises:
        ConfigError: a run file cannot be read, a name cannot be made or is not the only one, an
            exclusion excludes nothing; all problems of all stages at once.
    """
    found: dict[str, list[Point]] = {}
    problems: list[str] = []
    for name, stage in file.stages_in_order():
        where = f"{file.path}: stages.{name}" if file.sweep.stages else str(file.path)
        parents: list[Point | None] = [None]
        if stage.for_each is not None:
            parents = [*found.get(stage.for_each, [])]
        after = tuple(point.folder for other in stage.after for point in found.get(other, []))
        folder = Path(file.sweep.folder)
        maker = _PointMaker(
            where=where,
            stage_name=name,
            stage=stage,
            run_file=file.run_file(stage),
            folder=folder / name if file.sweep.stages else folder,
            after=after,
        )
        found[name] = maker.points(parents)
        problems += maker.problems
    points = list(itertools.chain.from_iterable(found.values()))
    if not problems and not points:
        problems.append(f"{file.path}: there is no run in this sweep")
    if len(points) > MAX_POINTS:
        problems.append(f"{file.path}: {len(points):,} runs, but at most {MAX_POINTS:,} can be")
    if problems:
        raise ConfigError(problems)
    return points


@dataclass
class _PointMaker:
    """Makes the points of one stage, and collects what is wrong with them."""

    where: str
    stage_name: str
    stage: StageConfig
    run_file: Path
    folder: Path
    after: tuple[Path, ...]

    def __post_init__(self) -> None:
        self.problems: list[str] = []

    def points(self, parents: Sequence[Point | None]) -> list[Point]:
        """Return the points for each of `parents`; None is no parent."""
        try:
            read_layers(self.run_file)
        except ConfigError as error:
            self.problems += [f"{self.where}: run: {problem}" for problem in error.problems]
            return []
        chosen = list(itertools.islice(self._choices(), MAX_POINTS + 1))
        made = [self._point(*choice, parent) for parent in parents for choice in chosen]
        counts = Counter(point.name for point in made)
        twice = [name for name, count in counts.items() if count > 1 and name]
        for name in twice[:5]:
            self.problems.append(
                f"{self.where}: name: {counts[name]} runs are called {name!r}; put the settings "
                "in which they differ into `name`"
            )
        return made

    def _choices(self) -> Iterator[tuple[Settings, str]]:
        """Yield the settings in which points differ, with the section that they stand in.

        These are the grid without exclusions, and the inclusions.
        """
        grid = flat(self.stage.grid)
        exclusions = [flat(item) for item in self.stage.exclude]
        hits = [0] * len(exclusions)
        if grid or not self.stage.include:
            for values in itertools.product(*grid.values()):
                choice = dict(zip(grid, values, strict=True))
                out = [index for index, item in enumerate(exclusions) if _has_all(choice, item)]
                for index in out:
                    hits[index] += 1
                if not out:
                    yield choice, "grid"
        for index, count in enumerate(hits):
            if not count:
                self.problems.append(f"{self.where}: exclude[{index}]: excludes nothing")
        for index, item in enumerate(self.stage.include):
            yield flat(item), f"include[{index}]"

    def _point(self, choice: Settings, section: str, parent: Point | None) -> Point:
        fixed = flat(self.stage.fixed)
        settings = {**fixed, **choice}
        sections = dict.fromkeys(fixed, "fixed") | dict.fromkeys(choice, section)
        if parent is not None:
            settings = {key: _with_parent(value, parent) for key, value in settings.items()}
        name = self._name(settings, choice, parent)
        return Point(
            stage=self.stage_name,
            name=name,
            folder=self.folder / name,
            run_file=self.run_file,
            task=self.stage.task,
            settings=settings,
            origins={key: f"{self.where}: {section}" for key, section in sections.items()},
            parents=self.after + ((parent.folder,) if parent is not None else ()),
        )

    def _name(self, settings: Settings, choice: Settings, parent: Point | None) -> str:
        template = self.stage.name
        if template is None:
            template = _default_template(choice, self.stage_name, parent)
        if parent is not None:
            template = template.replace("{parent.name}", parent.name)
        overrides = [f"{key}={toml_value(value)}" for key, value in settings.items()]
        try:
            data = read_layers(self.run_file, overrides).data
        except ConfigError as error:
            self.problems += [f"{self.where}: {problem}" for problem in error.problems]
            return ""
        missing = []

        def fill(match: re.Match[str]) -> str:
            value = _lookup(data, match[1])
            if value is None:
                missing.append(match[1])
            return _name_part(value)

        name = plain_name(_FIELD.sub(fill, template))
        for key in missing:
            self._add_once(
                f"{self.where}: name: {key!r} is neither in {self.run_file} nor in the sweep"
            )
        if not missing and not 0 < len(name) <= MAX_NAME:
            self._add_once(
                f"{self.where}: name: must have 1 to {MAX_NAME} characters, {name!r} has "
                f"{len(name)}"
            )
        return "" if missing else name

    def _add_once(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def plain_name(text: str) -> str:
    """Return a text as the name of a folder that needs no quoting anywhere.

    Args:
        text: any text; what is neither an ASCII letter or digit nor one of `_.+=-` becomes `-`.
            Points and dashes at the start, which make names hidden or look like options, go.
    """
    return re.sub(r"[^A-Za-z0-9_.+=-]+", "-", text).lstrip(".-")


def toml_value(value: Any) -> str:
    """Return a value as TOML in one line, as it may stand behind `key=`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_quoted(str(k))} = {toml_value(v)}" for k, v in value.items())
        return f"{{{inner}}}"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but TOML allows no bare delete and no surrogates.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _default_template(choice: Settings, stage: str, parent: Point | None) -> str:
    parts = ["{parent.name}"] if parent is not None else []
    parts += [f"{key.rpartition('.')[2]}-{{{key}}}" for key in choice]
    return "_".join(parts) if choice else "_".join([*parts, stage])


def _with_parent(value: Any, parent: Point) -> Any:
    if isinstance(value, str):
        return _PARENT.sub(lambda match: str(getattr(parent, match[1])), value)
    if isinstance(value, list):
        return [_with_parent(item, parent) for item in value]
    if isinstance(value, Mapping):
        return {key: _with_parent(item, parent) for key, item in value.items()}
    return value


def _has_all(choice: Settings, item: Settings) -> bool:
    return all(choice[key] == value for key, value in item.items())


def _lookup(data: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _name_part(value: Any) -> str:
    """Return a setting as it stands in a name."""
    if isinstance(value, list):
        return "x".join(map(_name_part, value))
    if isinstance(value, Mapping):
        return _name_part(value.get("kind", "table"))
    return "" if value is None else toml_value(value).strip('"')
