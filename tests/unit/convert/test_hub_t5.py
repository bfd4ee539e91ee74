"""Hugging Face T5 v1.0 read into ours, held against transformers itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_model import (
    assert_every_tensor_matters,
    assert_same,
    random_t5,
    read,
    write_tensors,
)

from mpotrain.errors import CheckpointError
from mpotrain.models.t5_config import T5Config


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"num_decoder_layers": 4, "layer_norm_epsilon": 1e-3},
        {"num_decoder_layers": None, "d_kv": 8},
        {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 5},
    ],
    ids=str,
)
def test_scores_are_those_of_transformers(variant: dict[str, Any], tmp_path: Path) -> None:
    model = random_t5(**variant)
    model.save_pretrained(tmp_path)
    source = read(tmp_path)
    assert_same(source, model)
    assert source.config.num_parameters() == sum(p.numel() for p in model.parameters())


def test_every_kind_of_tensor_matters(tmp_path: Path) -> None:
    random_t5().save_pretrained(tmp_path)
    assert_every_tensor_matters(read(tmp_path), lambda n: "blocks.1" in n)


def test_older_files_hold_all_names_of_the_embedding(tmp_path: Path) -> None:
    model = random_t5()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["relative_attention_max_distance"], config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    write_tensors(tmp_path, dict(model.state_dict()) | {unused: torch.randn(8, 4)})
    source = read(tmp_path)
    assert isinstance(source.config, T5Config)
    assert source.config.relative_distance == 128
    tensors = dict(model.state_dict())
    tensors["lm_head.weight"] = tensors["shared.weight"] * 2
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from shared\.weight"):
        read(tmp_path)


def test_newer_versions_of_t5_are_refused_with_the_reason(tmp_path: Path) -> None:
    random_t5(feed_forward_proj="gated-gelu").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert "feed_forward_proj: is 'gated-gelu'; our T5 is v1.0" in str(caught.value)
    assert "tie_word_embeddings: is false" in str(caught.value)


def test_buckets_that_ours_cannot_count_are_refused(tmp_path: Path) -> None:
    random_t5().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"relative_attention_num_buckets": 6, "d_ff": 0}))
    with pytest.raises(CheckpointError, match="ffn_size: is 0, no number"):
        read(tmp_path)
    path.write_text(json.dumps(found | {"relative_attention_num_buckets": 6}))
    with pytest.raises(CheckpointError, match="relative_buckets: 6 must be a multiple of 4"):
        read(tmp_path)
