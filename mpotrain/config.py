"""The run file: all sections in one composition, validated with every error at once (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.config_file import dump, json_schema, leaves, validate
from mpotrain.data.config import DataConfig
from mpotrain.data.masked_config import MaskedConfig
from mpotrain.engine.config import EngineConfig, LocalConfig, expert_problems, uncut_problems
from mpotrain.engine.config import problems as engine_problems
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.problems import Layout, megatron_problems
from mpotrain.errors import ConfigError
from mpotrain.layered_toml import LayeredTable, read_layers
from mpotrain.models.config import ModelConfig
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.parallel.plan import ParallelConfig, batch_problems
from mpotrain.sample import SampleLengths
from mpotrain.schema import collect_problems, config
from mpotrain.train.config import TrainConfig


class RunSettings(Protocol):
    """What the files of all kinds of runs have: pretraining (`RunConfig`) and fine-tuning."""

    @property
    def name(self) -> str:
        """Name of the run."""

    @property
    def folder(self) -> str:
        """Run folder."""

    @property
    def train(self) -> TrainConfig:
        """Steps, batch, optimizer, schedule, policies, intervals."""

    @property
    def engine(self) -> EngineConfig:
        """The back end that runs a step."""

    @property
    def parallel(self) -> ParallelConfig:
        """Parallel degrees."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """Interval, retention and verification of checkpoints."""

    def problems(self, world_size: int | None = None) -> list[str]:
        """Return everything that makes the run impossible."""


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
        network = collect_problems(lambda: self.model.problems("model"))
        sections = network + collect_problems(
            lambda: self.data.problems("data"),
            lambda: self.train.problems("train"),
            lambda: self.parallel.problems("parallel"),
        )
        return [
            *empty_problems(self, ("name", "folder")),
            *sections,
            *collect_problems(
                lambda: self.checkpoint.problems("checkpoint"),
                lambda: engine_problems(self.engine, world_size, "engine"),
                lambda: uncut_problems(self.engine, self.parallel),
                self._objective_problems,
                # Sizes that are wrong in themselves would be wrong once more for every degree.
                lambda: [] if sections else self._megatron_problems(world_size),
                lambda: self._expert_problems(world_size),
                lambda: [] if network else self._mask_problems(),
                lambda: world_problems(self, world_size),
            ),
        ]

    def sample_lengths(self) -> SampleLengths:
        """Return how long a sample is for each part of the network."""
        return self.data.objective.lengths(self.data.sequence_length)

    def _megatron_problems(self, world_size: int | None) -> list[str]:
        if not isinstance(self.engine, MegatronConfig):
            return []
        return megatron_problems(self._layout(world_size)) + self._update_problems(self.engine)

    def _layout(self, world_size: int | None) -> Layout:
        return Layout(
            model=self.model,
            parallel=self.parallel,
            data=self.data,
            global_batch_size=self.train.global_batch_size,
            micro_batch_size=self.train.micro_batch_size,
            world_size=world_size,
        )

    def _update_problems(self, engine: MegatronConfig) -> list[str]:
        found, mask = [], self.train.central_mask
        if mask.probability > 0 and mask.granularity == "element":
            chunks = self.parallel.virtual_pipeline
            if chunks > 1:
                found.append(
                    f'train.central_mask.granularity: "element", but with {chunks} chunks on a '
                    "stage (parallel.virtual_pipeline) a rank may hold several copies of a tensor, "
                    'whose elements would rest apart; use granularity="tensor", or '
                    "parallel.virtual_pipeline=1"
                )
        if self.train.optimizer.kind != "lamb" or not engine.distributed_optimizer:
            return found
        return [
            *found,
            "engine.distributed_optimizer: true, but LAMB takes norms of whole layers, which "
            "Megatron-core's distributed optimizer cuts over data-parallel ranks without regard to "
            'layers; set engine.distributed_optimizer=false, or train.optimizer.kind="adamw"',
        ]

    def _objective_problems(self) -> list[str]:
        """Return what is wrong between the network and what it is to predict."""
        model, data = self.model, self.data
        found = []
        longest = model.longest_sequence
        if longest is not None and data.sequence_length > longest:
            found.append(
                f"data.sequence_length: {data.sequence_length} is longer than "
                f"model.context_length {longest}"
            )
        if data.objective.kind not in model.objectives:
            found.append(
                f'data.objective.kind: "{data.objective.kind}", but a {model.kind} model learns '
                f"{' or '.join(model.objectives)}"
            )
        elif isinstance(model, EncoderConfig) and isinstance(data.objective, MaskedConfig):
            if model.pair_head != data.objective.pairs:
                why = "nothing would train it" if model.pair_head else "nobody is told of the order"
                found.append(
                    f"model.pair_head: {str(model.pair_head).lower()}, but data.objective.pairs is "
                    f"{str(data.objective.pairs).lower()}: {why}; set both alike"
                )
            if data.objective.pairs and model.num_token_types < 2:
                found.append(
                    f"model.num_token_types: {model.num_token_types}, but data.objective.pairs "
                    "makes two segments"
                )
        return found

    def _expert_problems(self, world_size: int | None) -> list[str]:
        """Return what is wrong between mixtures and the engine."""
        moe = self.model.moe
        num_experts = None if moe is None else moe.num_experts
        return expert_problems(self.engine, self.parallel.expert, num_experts, world_size)

    def _mask_problems(self) -> list[str]:
        """Return what is wrong between the network and the mask of central tensors."""
        probability = self.train.central_mask.probability
        if probability <= 0 or self.model.has_central_tensors():
            return []
        return [
            f"train.central_mask.probability: {probability}, but no site of the model has a "
            "central tensor; set it to 0, or tensorize a site"
        ]


def empty_problems(run: object, keys: Sequence[str]) -> list[str]:
    """Return which texts at the top of a run file are empty, one line each.

    Args:
        run: the run.
        keys: names of the texts.
    """

    def check(key: str) -> list[str]:
        return [] if getattr(run, key).strip() else [f"{key}: is empty"]

    return collect_problems(*(partial(check, key) for key in keys))


def world_problems(run: RunSettings, world_size: int | None) -> list[str]:
    """Return why the batch of a run cannot be cut over its ranks, one line each.

    Args:
        run: the run.
        world_size: number of processes; None = not known yet.
    """
    if world_size is None:
        return []
    train = run.train
    return batch_problems(train.global_batch_size, train.micro_batch_size, world_size, run.parallel)


def vocabulary_problem(run: RunConfig, vocab_size: int, where: str) -> str | None:
    """Say why a model has too few token ids for prepared data; None where it has enough.

    Args:
        run: the run.
        vocab_size: ids of the tokenizer of the data.
        where: folder of the data.
    """
    needed = run.data.objective.vocab_size(vocab_size)
    if needed <= run.model.vocab_size:
        return None
    own = "" if needed == vocab_size else f" and {needed - vocab_size} of data.objective"
    return (
        f"model.vocab_size: {run.model.vocab_size} is smaller than the vocabulary of the prepared "
        f"data, {vocab_size}{own} ({where}); set model.vocab_size to {needed} or more"
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and validate a run file.

    Args:
        path: TOML run file; may extend others.
        overrides: `dotted.key=value` lines.

    Returns:
        The validated run.

    Raises:
        ConfigError: with every mistake of form and of content, each with its file and dotted key;
            `mpotrain.config_file.validate` says what mistakes of form leave untold.
    """
    table = read_layers(path, overrides)
    if "task" in table.data and "model" not in table.data:
        raise ConfigError([f"{path}: is the file of a fine-tuning run; see `mpotrain tune`"])
    return config_from_table(table)


def config_from_table(table: LayeredTable) -> RunConfig:
    """Validate a merged table; see `load_config`."""
    model = table.data.get("model")
    if isinstance(model, dict):
        # Run files are older than the other networks.
        model.setdefault("kind", "gpt2")
    return validate(RunConfig, table)


def config_from_dict(data: dict[str, Any], source: str) -> RunConfig:
    """Validate a resolved configuration such as the one in a checkpoint manifest."""
    table = LayeredTable()
    table.merge(data, source)
    return config_from_table(table)


def dump_config(run: RunSettings) -> str:
    """Return a resolved run as TOML; `load_config` reads a `RunConfig` back to an equal object."""
    return dump(run)


def flatten(run: RunConfig) -> dict[str, Any]:
    """Return the resolved run as dotted keys in order; lists are leaves."""
    return leaves(run)


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of a run file (without `extends`)."""
    return json_schema(RunConfig)
