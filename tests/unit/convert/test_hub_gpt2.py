"""Hugging Face GPT-2 read into ours, held against transformers itself."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_model import (
    SIZES,
    assert_every_tensor_matters,
    assert_same,
    random_gpt2,
    read,
    write_tensors,
)

from mpotrain.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_gpt2().save_pretrained(tmp_path)
    return tmp_path


def test_scores_are_those_of_transformers(folder: Path) -> None:
    source = read(folder)
    assert_same(source, random_gpt2())
    assert source.config.num_parameters() == sum(p.numel() for p in random_gpt2().parameters())
    assert (source.config.ffn_size, source.config.num_layers) == (128, 3)


def test_every_kind_of_tensor_matters(folder: Path) -> None:
    # The bias of the keys shifts all scores of a query alike.
    source = read(folder)
    assert_every_tensor_matters(source, lambda n: "blocks.2" in n or "qkv.bias" in n)


def test_inner_size_and_shards(tmp_path: Path) -> None:
    model = random_gpt2(n_inner=72)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    source = read(tmp_path)
    assert source.config.ffn_size == 72
    assert_same(source, model)


def test_files_as_openai_first_wrote_them(folder: Path) -> None:
    """No leading `transformer.`, causal masks kept as tensors, the tied head stored once more."""
    model = random_gpt2()
    tensors = {name.removeprefix("transformer."): t for name, t in model.state_dict().items()}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    for layer in range(SIZES["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril().bool()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    write_tensors(folder, tensors)
    assert_same(read(folder), model)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    model = random_gpt2().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    source = read(tmp_path)
    assert {tensor.dtype for tensor in source.weights.values()} == {torch.float32}
    assert_same(source, model.float())


def test_features_that_ours_has_not_are_all_listed(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-6,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
        "n_layer": "three",
    }
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    for word in (
        "activation_function: is 'relu'",
        "layer_norm_epsilon: is 1e-06",
        "scale_attn_by_inverse_layer_idx: is True",
        "tie_word_embeddings: is False",
        "num_layers: is 'three'",
    ):
        assert word in str(caught.value)


def test_other_models_and_torn_files_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="'llama'; only gpt2, albert, bert, t5"):
        read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read(folder)


Tensors = dict[str, torch.Tensor]


def drop(tensors: Tensors) -> None:
    del tensors["transformer.h.1.mlp.c_fc.bias"]


def add(tensors: Tensors) -> None:
    tensors["transformer.h.1.mlp.gate.weight"] = torch.zeros(3)


def turn(tensors: Tensors) -> None:
    weight = tensors["transformer.h.1.mlp.c_fc.weight"]
    tensors["transformer.h.1.mlp.c_fc.weight"] = weight.t()


def poison(tensors: Tensors) -> None:
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].clone()
    tensors["transformer.wpe.weight"][3, 4] = torch.nan


def untie(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1


def quantize(tensors: Tensors) -> None:
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (drop, r"blocks\.1\.ffn\.c_fc\.bias: the model has it"),
        (add, r"transformer\.h\.1\.mlp\.gate\.weight: GPT-2 has no such tensor"),
        (turn, r"blocks\.1\.ffn\.c_fc\.weight: shape \[32, 128\]"),
        (poison, "position_embedding: holds NaN"),
        (untie, r"lm_head\.weight: differs from transformer\.wte"),
        (quantize, r"transformer\.wte\.weight: torch\.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[Tensors], None], word: str
) -> None:
    tensors = dict(random_gpt2().state_dict())
    tensors.pop("lm_head.weight", None)
    change(tensors)
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=word):
        read(folder)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        read(folder)
    assert not (folder / "exploded").exists()


def test_damaged_safetensors_and_indices_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        read(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        read(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(CheckpointError, match="no plain file name"):
        read(folder)
    index.write_text('{"weights": 3}')
    with pytest.raises(CheckpointError, match="no index"):
        read(folder)


DOWNLOAD = "import sys\nfrom mpotrain.convert.hub import download\nprint(download(sys.argv[1]))"


def fetch(name: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run `download` in a process that has no network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    command = [sys.executable, "-c", DOWNLOAD, name]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_hub_without_a_network(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    failed = fetch("someone/tiny", home)
    assert "hf:someone/tiny: cannot be fetched" in failed.stderr
    assert "name that folder" in failed.stderr
    cached = home / "hub" / "models--someone--tiny"
    commit = "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(snapshot / name)
    found = fetch("someone/tiny", home)
    assert found.stdout.strip().endswith(commit), found.stderr
    assert_same(read(Path(found.stdout.strip())), random_gpt2())
