"""Hugging Face GPT-2: `config.json` and safetensors files, from a folder or from the hub.

Names and layout are those of `transformers.GPT2LMHeadModel`, whose four matrices of a block are
stored (in, out); ours are stored (out, in). Nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpotrain.convert.source import Source, listing, require_weights
from mpotrain.errors import CheckpointError, ConfigError
from mpotrain.models.config import GPT2Config

HUB_MARK = "hf:"
"""What tells the name of a model on the hub from a folder."""
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Names of the one activation that our GPT-2 computes."""
FIXED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""What our GPT-2 does not leave open; absent keys have these values."""
SIZES = {
    "vocab_size": ("vocab_size", 50257),
    "context_length": ("n_positions", 1024),
    "hidden_size": ("n_embd", 768),
    "num_layers": ("n_layer", 12),
    "num_heads": ("n_head", 12),
}
"""Our sizes, their keys in `config.json` and what an absent key means."""

OUTER_NAMES = {
    "wte.weight": "token_embedding.weight",
    "wpe.weight": "position_embedding",
    "ln_f.weight": "final_norm.weight",
    "ln_f.bias": "final_norm.bias",
}
BLOCK_MODULES = {
    "ln_1": "norm_1",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "norm_2",
    "mlp.c_fc": "ffn.c_fc",
    "mlp.c_proj": "ffn.c_proj",
}
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Modules whose weight is stored (in, out)."""
_BLOCK = re.compile(r"h\.(\d+)\.(.+)\.(weight|bias)")
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def hub_source(folder: Path, origin: str) -> Source:
    """Read a Hugging Face GPT-2 from a folder.

    Args:
        folder: holds `config.json` and `model.safetensors` (or its shards and their index).
        origin: what to call it.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not one that our GPT-2 can
            compute; all reasons are listed.
    """
    config = read_config(folder / CONFIG_FILE)
    weights: dict[str, Tensor] = {}
    unknown, head = [], None
    for full_name, tensor in _tensors(folder):
        name = full_name.removeprefix("transformer.")
        if _MASK.fullmatch(name):  # the causal mask, which older files keep as a tensor
            continue
        if name == "lm_head.weight":
            head = tensor.float()
            continue
        ours = logical_name(name)
        if ours is None:
            unknown.append(f"{full_name}: GPT-2 has no such tensor")
            continue
        if not tensor.is_floating_point():
            unknown.append(f"{full_name}: {tensor.dtype}; only floating-point weights can be read")
            continue
        is_matrix = name.endswith(".weight") and any(f".{m}." in name for m in MATRICES)
        tensor = tensor.float()
        weights[ours] = tensor.t().contiguous() if is_matrix else tensor.contiguous()
    embedding = weights.get("token_embedding.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        unknown.append(
            "lm_head.weight: differs from wte.weight, but our output layer is tied to it"
        )
    if unknown:
        raise CheckpointError(f"{origin}: cannot be taken over:\n{listing(unknown)}")
    require_weights(config, weights, origin)
    tokenizer = next((folder / n for n in TOKENIZER_FILES if (folder / n).is_file()), None)
    return Source(origin, config, weights, tokenizer_file=tokenizer)


def read_config(path: Path) -> GPT2Config:
    """Read the sizes of a Hugging Face GPT-2.

    Args:
        path: its `config.json`.

    Raises:
        CheckpointError: it is no GPT-2, or one with features that ours has not.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("model_type") != "gpt2":
        kind = found.get("model_type") if isinstance(found, dict) else None
        raise CheckpointError(f"{path}: model_type is {kind!r}; only gpt2 can be converted")
    problems = [
        f"{key}: is {found[key]!r}, our GPT-2 has {value!r}"
        for key, value in FIXED.items()
        if key in found and found[key] != value
    ]
    activation = found.get("activation_function", TANH_GELU[0])
    if activation not in TANH_GELU:
        problems.append(f"activation_function: is {activation!r}, our GPT-2 has {TANH_GELU[0]!r}")
    sizes = {ours: found.get(key, default) for ours, (key, default) in SIZES.items()}
    inner = found.get("n_inner")
    sizes["ffn_size"] = inner if inner is not None else _times_four(sizes["hidden_size"])
    problems += [
        f"{name}: is {size!r}, no number of at least 1"
        for name, size in sizes.items()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]
    if not problems:
        config = GPT2Config(**sizes)
        problems = config.problems("config")
    if problems:
        raise CheckpointError(f"{path}: cannot be taken over:\n{listing(problems)}")
    return config


def logical_name(name: str) -> str | None:
    """Return our name of a tensor, None for a foreign one.

    Args:
        name: name in the file without the leading `transformer.`, e.g. `h.3.mlp.c_fc.weight`.
    """
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in BLOCK_MODULES:
        return None
    return f"blocks.{int(match[1])}.{BLOCK_MODULES[match[2]]}.{match[3]}"


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


def _times_four(size: Any) -> Any:
    return 4 * size if isinstance(size, int) else size


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a model with their names in the file."""
    safetensors = _library()
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
            "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise CheckpointError(f"{folder}: has no {WEIGHTS_FILE}")


def _library() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ConfigError(
            ["command line: SOURCE: reading safetensors needs: pip install 'mpotrain[hf]'"]
        ) from error
