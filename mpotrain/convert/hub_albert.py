"""ALBERT as Hugging Face keeps it (`transformers.AlbertForPreTraining`; Lan et al. 2020)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mpotrain.convert.hub_encoder import HEADS, architecture, read_settings, write_settings
from mpotrain.convert.hub_family import HubFamily, Place, fixed_problems, read_sizes
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.nn.sharing_config import SharingConfig

FIXED: dict[str, Any] = {
    "inner_group_num": 1,
    "net_structure_type": 0,
    "gap_size": 0,
    "num_memory_blocks": 0,
}
"""What our shared encoder does not leave open; absent keys have these values."""
DEFAULTS = {
    "vocab_size": 30000,
    "context_length": 512,
    "hidden_size": 4096,
    "num_layers": 12,
    "num_heads": 64,
    "ffn_size": 16384,
    "num_token_types": 2,
}
OWN_SIZES = {"embedding_size": ("embedding_size", 128), "groups": ("num_hidden_groups", 1)}
OUTER = {
    "embedding_norm": "albert.embeddings.LayerNorm",
    "embedding_map": "albert.encoder.embedding_hidden_mapping_in",
    "mlm_head.transform": "predictions.dense",
    "mlm_head.norm": "predictions.LayerNorm",
    "pooler": "albert.pooler",
    "pair_head": "sop_classifier.classifier",
}
LAYER = {
    "attention.query": "attention.query",
    "attention.key": "attention.key",
    "attention.value": "attention.value",
    "attention.out": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "ffn.c_fc": "ffn",
    "ffn.c_proj": "ffn_output",
    "ffn_norm": "full_layer_layer_norm",
}


def read(found: Mapping[str, Any]) -> tuple[EncoderConfig | None, list[str]]:
    """Return our configuration of a Hugging Face ALBERT, or all reasons against it."""
    settings, problems = read_settings(found, "ALBERT", DEFAULTS, "gelu_new")
    sizes, wrong = read_sizes(found, OWN_SIZES)
    problems += fixed_problems(found, FIXED, "ALBERT") + wrong
    if problems:
        return None, problems
    config = EncoderConfig(
        **settings,
        embedding_size=sizes["embedding_size"],
        sharing=SharingConfig(scope="all", groups=sizes["groups"]),
    )
    problems = config.problems("config")
    return (None, problems) if problems else (config, [])


def write(config: EncoderConfig) -> dict[str, Any]:
    """Return the keys of `config.json`."""
    return {
        "architectures": architecture(config, "Albert"),
        **write_settings(config),
        "embedding_size": config.embedding_width,
        "num_hidden_groups": config.sharing.groups,
        "inner_group_num": 1,
        "classifier_dropout_prob": config.dropout,
    }


def places(config: EncoderConfig) -> dict[str, Place]:
    """Return where each tensor is kept."""
    table = "albert.embeddings.word_embeddings.weight"
    found = {
        "token_embedding.weight": Place(table, also=("predictions.decoder.weight",)),
        "position_embedding": Place("albert.embeddings.position_embeddings.weight"),
        "type_embedding": Place("albert.embeddings.token_type_embeddings.weight"),
        "mlm_head.bias": Place("predictions.bias", also=("predictions.decoder.bias",)),
    }
    for leaf in ("weight", "bias"):
        for ours, theirs in OUTER.items():
            if config.pair_head or ours not in ("pooler", "pair_head"):
                found[f"{ours}.{leaf}"] = Place(f"{theirs}.{leaf}")
        for group in range(config.sharing.groups):
            layer = f"albert.encoder.albert_layer_groups.{group}.albert_layers.0"
            for ours, theirs in LAYER.items():
                found[f"blocks.{group}.{ours}.{leaf}"] = Place(f"{layer}.{theirs}.{leaf}")
    return found


ALBERT = HubFamily(
    model_type="albert",
    label="ALBERT",
    read=read,
    write=write,
    places=places,
    base="albert.",
    ignored=re.compile(r"embeddings\.(position_ids|token_type_ids)"),
    heads=HEADS,
)
"""ALBERT with the heads of pretraining, or without."""
