"""The run file: all sections in one composition, validated with every error at once (no torch)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.data.config import DataConfig
from mpotrain.engine.config import EngineConfig, LocalConfig, expert_problems
from mpotrain.engine.config import problems as engine_problems
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import LayeredTable, read_layers
from mpotrain.models.config import ModelConfig
from mpotrain.nn.moe.config import MoEConfig
from mpotrain.parallel.plan import ParallelConfig, batch_problems
from mpotrain.schema import config, to_dict
from mpotrain.train.config import TrainConfig


@config
class RunConfig:
    """Everything that defines a pretraining run.

    Nothing here is read from the environment or derived from the number of processes: the global
    batch stands in the file and the world is checked against it.
    """

    name: str
    """Name of the run, shown in logs."""
    folder: str
    """Run folder: checkpoints, metrics, resolved configuration."""
    model: ModelConfig
    """The network."""
    data: DataConfig
    """Prepared token shards, their blend and split."""
    train: TrainConfig
    """Steps, batch, optimizer, schedule, policies, intervals."""
    engine: EngineConfig = LocalConfig()
    """The back end that runs a step."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallel degrees; the world is checked against them."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Interval, retention and verification of checkpoints."""

    def problems(self, world_size: int | None = None) -> list[str]:
        """Return everything that makes the run impossible, one line each, with dotted keys.

        Args:
            world_size: number of processes where it is known.
        """
        found = [f"{key}: is empty" for key in ("name", "folder") if not getattr(self, key).strip()]
        found += [
            *self.model.problems("model"),
            *self.data.problems("data"),
            *self.train.problems("train"),
            *self.checkpoint.problems("checkpoint"),
            *self.parallel.problems("parallel"),
            *engine_problems(self.engine, world_size, "engine"),
        ]
        if self.data.sequence_length > self.model.context_length:
            found.append(
                f"data.sequence_length: {self.data.sequence_length} is longer than "
                f"model.context_length {self.model.context_length}"
            )
        found += self._expert_problems(self.model.moe, world_size)
        if world_size is not None:
            found += batch_problems(
                self.train.global_batch_size, self.train.micro_batch_size, world_size, self.parallel
            )
        return found

    def _expert_problems(self, moe: MoEConfig | None, world_size: int | None) -> list[str]:
        """Return what is wrong between mixtures, the engine and the mask of central tensors."""
        num_experts = None if moe is None else moe.num_experts
        found = expert_problems(self.engine, self.parallel.expert, num_experts, world_size)
        if self.train.central_mask.probability > 0 and not self.model.has_central_tensors():
            found.append(
                f"train.central_mask.probability: {self.train.central_mask.probability}, but no "
                "site of the model has a central tensor; set it to 0, or tensorize a site"
            )
        return found


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and validate a run file.

    Args:
        path: TOML run file; may extend others.
        overrides: `dotted.key=value` lines.

    Returns:
        The validated run.

    Raises:
        ConfigError: with every mistake of form (unknown keys, wrong types) and, where the form is
            right, every mistake of content, each with its file and dotted key.
    """
    table = read_layers(path, overrides)
    return config_from_table(table)


def config_from_table(table: LayeredTable) -> RunConfig:
    """Validate a merged table; see `load_config`."""
    try:
        # JSON mode takes arrays for tuples and stays strict about numbers.
        run = _adapter().validate_json(json.dumps(table.data, default=_refuse))
    except ValidationError as error:
        raise ConfigError(
            [_explain(detail, table) for detail in error.errors(include_url=False)]
        ) from error
    problems = run.problems()
    if problems:
        located = [f"{table.source_of(line.partition(':')[0])}: {line}" for line in problems]
        raise ConfigError(located)
    return run


def config_from_dict(data: dict[str, Any], source: str) -> RunConfig:
    """Validate a resolved configuration such as the one in a checkpoint manifest."""
    table = LayeredTable()
    table.merge(data, source)
    return config_from_table(table)


def dump_config(run: RunConfig) -> str:
    """Return the resolved run as TOML that `load_config` reads back to an equal object."""
    return tomli_w.dumps(to_dict(run))


def flatten(run: RunConfig) -> dict[str, Any]:
    """Return the resolved run as dotted keys in order; lists are leaves."""
    leaves: dict[str, Any] = {}

    def walk(value: Any, at: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{at}.{key}" if at else key)
        else:
            leaves[at] = value

    walk(to_dict(run), "")
    return leaves


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of a run file (without `extends`)."""
    return _adapter().json_schema()


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _refuse(value: object) -> str:
    """Write dates as text, which no field accepts silently; TOML has no other foreign types."""
    return f"{type(value).__name__} {value}"


def _explain(detail: ErrorDetails, table: LayeredTable) -> str:
    """Turn one pydantic error into `file: dotted.key: what is wrong`."""
    path = _key_path(detail["loc"], table.data)
    dotted = ".".join(path)
    source = table.source_of(dotted)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _fields_at(path[:-1], table.data)
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
        return f"{source}: {dotted}: unknown key{hint}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{source}: {dotted}: required, but not set"
    shown = repr(detail["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{source}: {dotted or 'run file'}: {message}, got {shown}"


def _key_path(location: tuple[int | str, ...], data: Any) -> list[str]:
    """Drop the tags that pydantic puts into the location of a member of a union."""
    path = []
    for part in location:
        if isinstance(data, dict) and part not in data and part == data.get("kind"):
            continue
        path.append(str(part))
        if isinstance(data, dict):
            data = data.get(str(part))
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
    return path


def _fields_at(path: Sequence[str], data: Any) -> list[str]:
    """Return the field names of the section at `path`, following tagged unions by their `kind`."""
    current: Any = RunConfig
    for part in path:
        if part.isdigit():
            current = get_args(current)[0]
            data = data[int(part)]
        else:
            current = typing.get_type_hints(current, include_extras=True)[part]
            data = data.get(part, {})
        current = _member(current, data)
    return [field.name for field in dataclasses.fields(current)]


def _member(hint: Any, data: Any) -> Any:
    """Return the member of a (tagged, optional, annotated) union that `data` selects."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    members = [member for member in get_args(hint) if dataclasses.is_dataclass(member)]
    kind = data.get("kind") if isinstance(data, dict) else None
    named = [m for m in members if kind in get_args(typing.get_type_hints(m).get("kind"))]
    return (named or members)[0]
