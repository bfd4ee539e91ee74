"""BERT as Hugging Face keeps it (`transformers.BertForPreTraining`; Devlin et al. 2019)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mpotrain.convert.hub_encoder import HEADS, architecture, read_settings, write_settings
from mpotrain.convert.hub_family import HubFamily, Place
from mpotrain.models.encoder_config import EncoderConfig

DEFAULTS = {
    "vocab_size": 30522,
    "context_length": 512,
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "ffn_size": 3072,
    "num_token_types": 2,
}
OUTER = {
    "embedding_norm": "bert.embeddings.LayerNorm",
    "mlm_head.transform": "cls.predictions.transform.dense",
    "mlm_head.norm": "cls.predictions.transform.LayerNorm",
    "pooler": "bert.pooler.dense",
    "pair_head": "cls.seq_relationship",
}
LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn.c_fc": "intermediate.dense",
    "ffn.c_proj": "output.dense",
    "ffn_norm": "output.LayerNorm",
}


def read(found: Mapping[str, Any]) -> tuple[EncoderConfig | None, list[str]]:
    """Return our configuration of a Hugging Face BERT, or all reasons against it."""
    settings, problems = read_settings(found, "BERT", DEFAULTS, "gelu")
    if problems:
        return None, problems
    config = EncoderConfig(**settings)
    problems = config.problems("config")
    return (None, problems) if problems else (config, [])


def write(config: EncoderConfig) -> dict[str, Any]:
    """Return the keys of `config.json`."""
    return {
        "architectures": architecture(config, "Bert"),
        **write_settings(config),
        "classifier_dropout": config.dropout,
    }


def places(config: EncoderConfig) -> dict[str, Place]:
    """Return where each tensor is kept."""
    table, bias = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
    found = {
        "token_embedding.weight": Place("bert.embeddings.word_embeddings.weight", also=(table,)),
        "position_embedding": Place("bert.embeddings.position_embeddings.weight"),
        "type_embedding": Place("bert.embeddings.token_type_embeddings.weight"),
        "mlm_head.bias": Place("cls.predictions.bias", also=(bias,)),
    }
    for leaf in ("weight", "bias"):
        for ours, theirs in OUTER.items():
            if config.pair_head or ours not in ("pooler", "pair_head"):
                found[f"{ours}.{leaf}"] = Place(f"{theirs}.{leaf}")
        for layer in range(config.num_layers):
            for ours, theirs in LAYER.items():
                name = f"bert.encoder.layer.{layer}.{theirs}.{leaf}"
                found[f"blocks.{layer}.{ours}.{leaf}"] = Place(name)
    return found


BERT = HubFamily(
    model_type="bert",
    label="BERT",
    read=read,
    write=write,
    places=places,
    base="bert.",
    ignored=re.compile(r"embeddings\.(position_ids|token_type_ids)"),
    # Files made of the first TensorFlow checkpoints keep its names of the two vectors of a norm.
    older={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    heads=HEADS,
)
"""BERT with the heads of pretraining, or without."""
