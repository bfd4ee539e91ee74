"""Hugging Face models: `config.json` and safetensors files, from a folder or from the hub.

Nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mpotrain.convert.hub_albert import ALBERT
from mpotrain.convert.hub_bert import BERT
from mpotrain.convert.hub_family import HubFamily
from mpotrain.convert.hub_gpt2 import GPT2
from mpotrain.convert.hub_t5 import T5
from mpotrain.convert.source import Source, listing, require_weights
from mpotrain.convert.vocabulary import TOKENIZER_FILES, tokenizer_files
from mpotrain.errors import CheckpointError, ConfigError

HUB_MARK = "hf:"
"""What tells the name of a model on the hub from a folder."""
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

FAMILIES: dict[str, HubFamily[Any]] = {
    family.model_type: family for family in (GPT2, ALBERT, BERT, T5)
}
"""The kinds of models that can be read and written, by their `model_type`."""


def hub_source(folder: Path, origin: str) -> Source:
    """Read a Hugging Face model from a folder.

    Args:
        folder: holds `config.json` and `model.safetensors` (or its shards and their index).
        origin: what to call it.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not one that ours can
            compute; all reasons are listed.
    """
    path = folder / CONFIG_FILE
    found = _read_json(path)
    family = FAMILIES.get(str(found.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"{path}: model_type is {found.get('model_type')!r}; only "
            f"{', '.join(FAMILIES)} can be converted"
        )
    config, problems = family.read(found)
    if config is None:
        raise CheckpointError(f"{path}: cannot be taken over:\n{listing(problems)}")
    weights, problems = family.take(config, _tensors(folder))
    if problems:
        raise CheckpointError(f"{origin}: cannot be taken over:\n{listing(problems)}")
    fresh = family.fresh(config, weights)
    require_weights(config, weights, origin, fresh)
    return Source(origin, config, weights, fresh, tokenizer_files=tokenizer_files(folder))


def download(name: str) -> Path:
    """Fetch a model from the Hugging Face hub, or find it in the local cache.

    Args:
        name: OWNER/NAME or NAME, with @REVISION where a certain one is wanted.

    Returns:
        Folder with the files.

    Raises:
        CheckpointError: no network and not in the cache, no such model, no access.
        ConfigError: the client library is not installed.
    """
    name, _, revision = name.partition("@")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(
            [f"command line: {HUB_MARK}{name}: needs huggingface_hub: pip install 'mpotrain[hf]'"]
        ) from error
    wanted = [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # network, hub and cache errors of many kinds
        raise CheckpointError(
            f"{HUB_MARK}{name}: cannot be fetched from the hub ({type(error).__name__}: "
            f"{(str(error).strip().splitlines() or [''])[0]}). Check the name; without a network, "
            f"copy {CONFIG_FILE}, {WEIGHTS_FILE} and tokenizer.json into a folder elsewhere and "
            "name that folder"
        ) from error


def safetensors_library(purpose: str) -> Any:
    """Return the module `safetensors`.

    Args:
        purpose: what it is needed for, at the head of the message.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ConfigError(
            [f"command line: {purpose} safetensors needs: pip install 'mpotrain[hf]'"]
        ) from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a model with their names in the file."""
    safetensors = safetensors_library("SOURCE: reading")
    for path in _files(folder):
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - the file object is no mapping
                    yield name, file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            content: Mapping[str, Any] = json.loads(index.read_bytes())
            names = sorted({str(name) for name in content["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{index}: is no index of safetensors files: {error!r}"
            ) from error
        strange = [name for name in names if Path(name).name != name]
        if strange:
            raise CheckpointError(f"{index}: {strange[0]!r} is no plain file name")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: has {pickles[0]} but no {WEIGHTS_FILE}. A pickle can run any code when it "
            "is read, so it is not. If you trust it, rewrite it where transformers is installed: "
            "AutoModelForPreTraining.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise CheckpointError(f"{folder}: has no {WEIGHTS_FILE}")
