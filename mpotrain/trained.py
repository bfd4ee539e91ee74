"""What one does with a run folder afterwards: open its model, evaluate, write text, look inside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpotrain.assemble import build_engine, build_model, model_signatures, open_data, prepare_torch
from mpotrain.checkpoint.compare import require_model, require_network
from mpotrain.checkpoint.config import CheckpointConfig
from mpotrain.checkpoint.manifest import WEIGHT, Manifest
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.config import RunConfig, config_from_table
from mpotrain.data.claim import SETTINGS_NAME
from mpotrain.data.manifest import (
    MANIFEST_NAME,
    TokenizerEntry,
    file_digest,
    read_manifest,
    tokenizer_digest,
)
from mpotrain.data.stream import Split
from mpotrain.data.tokenizer import Tokenizer, open_tokenizer
from mpotrain.engine.config import LocalConfig
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.errors import CheckpointError, ConfigError, DataError
from mpotrain.evaluate import Evaluation, Evaluator
from mpotrain.generate import Sampling, generate
from mpotrain.inspect import describe_checkpoint, describe_data, site_rows
from mpotrain.layered_toml import OVERRIDE_SOURCE, LayeredTable
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.nn.moe.router import keep_all_tokens
from mpotrain.nn.spectra import model_spectra
from mpotrain.parallel.environment import resolve_environment
from mpotrain.parallel.ranks import World, close_world, init_world, resolve_device
from mpotrain.run_record import CHECKPOINTS
from mpotrain.schema import to_dict

SINGLE = World(0, 1, 0, torch.device("cpu"))


@dataclass(frozen=True)
class TrainedModel:
    """A model read back from a checkpoint.

    Attributes:
        run: the configuration that it was trained with, overrides applied.
        manifest: of the checkpoint.
        folder: run folder that holds the checkpoint.
        model: with the checkpoint's weights, in evaluation mode.
    """

    run: RunConfig
    manifest: Manifest
    folder: Path
    model: nn.Module


def find_checkpoint(folder: Path, step: int | None) -> tuple[CheckpointStore, Manifest]:
    """Return the newest sound checkpoint of a run folder, or the one that is named.

    Args:
        folder: a run folder, its `checkpoints` folder, or one `step-...` folder.
        step: step of the checkpoint; None for the newest.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if folder.name.startswith("step-") and folder.name[5:].isdigit():
        own = int(folder.name[5:])
        if step not in (None, own):
            raise ConfigError([f"{OVERRIDE_SOURCE}: --step {step}: {folder} is that of step {own}"])
        step, folder = own, folder.parent
    elif (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    store = CheckpointStore(folder, CheckpointConfig(), SINGLE)
    manifest = store.latest() if step is None else store.open(step).manifest
    if manifest is None:
        raise CheckpointError(f"{folder}: holds no checkpoint; name a run folder or a checkpoint")
    return store, manifest


def saved_run(manifest: Manifest, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration in a checkpoint, with overrides laid over it.

    Raises:
        ConfigError: an override is wrong, or the checkpoint is of another version of the schema.
        CheckpointError: it is a checkpoint of a fine-tuning run.
    """
    if "task" in manifest.run.config:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} holds a fine-tuned classifier; this command "
            "reads pretraining runs. `mpotrain tune` with the file of its run evaluates it"
        )
    table = LayeredTable()
    table.merge(manifest.run.config, f"checkpoint of step {manifest.step}")
    for line in overrides:
        table.override(line)
    return config_from_table(table)


def load_trained(folder: Path, step: int | None, overrides: Sequence[str] = ()) -> TrainedModel:
    """Read a model back on the CPU, to compute in the run's dtype unless overridden.

    Raises:
        CheckpointError: no sound checkpoint, or it does not fit the model of `overrides`.
    """
    store, manifest = find_checkpoint(folder, step)
    run = saved_run(manifest, overrides)
    prepare_torch(run)
    model = build_model(run.model, seed=run.train.seed, dtype=run.engine.dtype)
    require_model(manifest, model_signatures(model, run))
    require_network(manifest, to_dict(run.model))
    reader = store.open(manifest.step)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(reader.read(name, (WEIGHT,))[WEIGHT])
    return TrainedModel(run, manifest, store.folder.parent, model.eval())


def evaluate_checkpoint(
    folder: Path, step: int | None, overrides: Sequence[str], split: Split, sequences: int | None
) -> Evaluation | None:
    """Evaluate a checkpoint on a split, in one process or on every rank of a launched world.

    Returns:
        The result on the first rank, None on the others.

    Raises:
        DataError: the data were made with another tokenizer than the model's.
    """
    if sequences is not None and sequences < 1:
        raise ConfigError([f"{OVERRIDE_SOURCE}: --sequences {sequences}: must be at least 1"])
    trained = load_trained(folder, step, overrides)
    run, ranks = trained.run, resolve_environment(os.environ)
    # Evaluation knows no global batch: any number of ranks will do.
    batch = run.train.micro_batch_size * ranks.size
    run = replace(run, train=replace(run.train, global_batch_size=batch))
    experts = gcd(run.parallel.expert, ranks.size)
    run = replace(run, parallel=replace(run.parallel, expert=experts))
    if ranks.size == 1:
        run = replace(run, engine=LocalConfig(dtype=run.engine.dtype, device=run.engine.device))
    if isinstance(run.engine, MegatronConfig):
        run = replace(run, parallel=replace(run.parallel, data=None))
        if found := run.problems(ranks.size):
            raise ConfigError(found)
    world = init_world(run.engine.kind, run.engine.device, ranks=ranks, parallel=run.parallel)
    try:
        dataset = open_data(run, split)
        saved = saved_tokenizer(trained.manifest)
        if dataset.tokenizer.digest != saved.digest:
            raise DataError(
                f"{run.data.sources[0].path}: its tokenizer ({dataset.tokenizer.kind}, "
                f"{dataset.tokenizer.vocab_size:,} pieces) is not the one that {folder} was "
                f"trained with ({saved.kind}, {saved.vocab_size:,} pieces); the loss would mean "
                "nothing. Name data prepared with that tokenizer (data.sources=...)"
            )
        engine = build_engine(run, trained.model, world)
        evaluator = Evaluator(
            engine, dataset, micro_batch_size=run.train.micro_batch_size, num_sequences=sequences
        )
        result = evaluator()
        engine.close()
        return result if world.is_main else None
    finally:
        close_world(world)


def saved_tokenizer(manifest: Manifest) -> TokenizerEntry:
    """Return what a checkpoint says of the tokenizer of its data.

    Raises:
        CheckpointError: it says nothing.
    """
    try:
        return TokenizerEntry(**manifest.run.train_state["tokenizer"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} does not say which tokenizer its data have "
            f"({error!r}); go on training for a step, which writes a complete one"
        ) from error


def run_tokenizer(trained: TrainedModel) -> Tokenizer:
    """Open the tokenizer that a model was trained with, from its run folder or its data.

    Raises:
        DataError: it is nowhere to be found, or the file is another one.
    """
    entry = saved_tokenizer(trained.manifest)
    if entry.file is None:
        raise DataError(
            f"{trained.folder}: the model was trained on token numbers without a tokenizer; "
            "text can neither be read nor written"
        )
    places = [trained.folder, *(Path(source.path) for source in trained.run.data.sources)]
    return open_tokenizer(find_tokenizer(entry, places), entry.eot_id)


def find_tokenizer(entry: TokenizerEntry, places: Sequence[Path]) -> Path:
    """Return the file of a tokenizer, from the first folder that has it unchanged.

    Args:
        entry: the tokenizer; it has a file.
        places: folders to look in.

    Raises:
        DataError: it is nowhere to be found, or the file is another one.
    """
    assert entry.file is not None
    for place in places:
        path = place / entry.file
        if not path.is_file():
            continue
        content = file_digest(path)
        if tokenizer_digest(entry.kind, content, entry.vocab_size, entry.eot_id) == entry.digest:
            return path
    raise DataError(
        f"{entry.file}: the tokenizer of this model is in none of "
        f"{', '.join(map(str, places))} (or the file there is another one); put it back"
    )


def generate_texts(
    folder: Path, step: int | None, prompt: str, sampling: Sampling, num_samples: int
) -> list[str]:
    """Let a checkpoint continue a prompt several times.

    Returns:
        Prompt and continuation, one text for each sample; sample n draws with seed + n.
    """
    trained = load_trained(folder, step)
    config = trained.run.model
    if not isinstance(config, GPT2Config):
        raise ConfigError(
            [f"{folder}: holds a model of kind {config.kind}; only gpt2 continues a text"]
        )
    tokenizer = run_tokenizer(trained)
    trained.model.to(resolve_device(trained.run.engine.device))
    keep_all_tokens(trained.model)
    start = tokenizer.encode(prompt)
    if not start:
        # Documents begin after the end of another one.
        start = [tokenizer.eot_id or 0]
    texts = []
    for number in range(num_samples):
        new = generate(
            trained.model,
            start,
            replace(sampling, seed=sampling.seed + number),
            context_length=config.context_length,
            vocab_size=tokenizer.vocab_size,
            stop_token=tokenizer.eot_id,
        )
        texts.append(tokenizer.decode([*start, *new]) if prompt else tokenizer.decode(new))
    return texts


def held_out_text(folder: Path) -> bytes:
    """Return the validation text of a run, decoded from the tokens of its data."""
    trained = load_trained(folder, None)
    tokenizer, dataset = run_tokenizer(trained), open_data(trained.run, "validation")
    streams = [source.stream for source in dataset.sources]
    texts = (tokenizer.decode(s.read(0, s.num_tokens).tolist()) for s in streams)
    return "".join(texts).encode()


def inspect_folder(folder: Path, step: int | None) -> tuple[dict[str, Any], str]:
    """Describe prepared data, or a checkpoint with the spectra of its tensorized layers.

    Returns:
        Plain data for JSON, and text for a terminal.
    """
    if (folder / MANIFEST_NAME).is_file() and not folder.name.startswith("step-"):
        manifest = read_manifest(folder)
        return describe_data(folder, manifest)
    if (folder / SETTINGS_NAME).is_file():
        raise DataError(
            f"{folder}: `mpotrain prepare` has not finished here; run the same command again"
        )
    trained = load_trained(folder, step)
    rows = site_rows(model_spectra(trained.model))
    num_parameters = trained.run.model.num_parameters()
    data, text = describe_checkpoint(trained.manifest, num_parameters, rows)
    return data | {"sites": [asdict(row) for row in rows]}, text
