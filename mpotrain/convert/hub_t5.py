"""T5 v1.0 as Hugging Face keeps it (`transformers.T5ForConditionalGeneration`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mpotrain.convert.hub_family import (
    HubFamily,
    Place,
    alias_problems,
    positive_problem,
    read_sizes,
    size_problems,
)
from mpotrain.models.t5_config import T5Config

SIZES = {
    "vocab_size": ("vocab_size", 32128),
    "hidden_size": ("d_model", 512),
    "head_size": ("d_kv", 64),
    "ffn_size": ("d_ff", 2048),
    "num_layers": ("num_layers", 6),
    "num_heads": ("num_heads", 8),
    "relative_buckets": ("relative_attention_num_buckets", 32),
    "relative_distance": ("relative_attention_max_distance", 128),
}
"""Our sizes, their keys in `config.json` and what an absent key means."""
TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
"""Further names of the one embedding."""
ALIASES = {
    "hidden_size": ("d_model", 512),
    "num_hidden_layers": ("num_layers", 6),
    "num_attention_heads": ("num_heads", 8),
    "head_dim": ("d_kv", 64),
}
"""Second names of sizes."""
ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def read(found: Mapping[str, Any]) -> tuple[T5Config | None, list[str]]:
    """Return our configuration of a Hugging Face T5 v1.0, or all reasons against it."""
    problems = _newer(found) + alias_problems(found, ALIASES)
    sizes, wrong = read_sizes(found, SIZES)
    decoder = found.get("num_decoder_layers")
    if decoder is not None:
        wrong += size_problems({"num_decoder_layers": decoder})
    problems += wrong + positive_problem(found, "layer_norm_epsilon")
    if problems:
        return None, problems
    config = T5Config(
        **sizes, num_decoder_layers=decoder, norm_eps=found.get("layer_norm_epsilon", 1e-6)
    )
    problems = config.problems("config")
    return (None, problems) if problems else (config, [])


def _newer(found: Mapping[str, Any]) -> list[str]:
    """Return what makes a model T5 v1.1 or later instead of v1.0."""
    problems = []
    projection = found.get("feed_forward_proj", "relu")
    if projection != "relu":
        problems.append(
            f"feed_forward_proj: is {projection!r}; our T5 is v1.0, whose feed-forward layers have "
            "ReLU and no gate (v1.1, mT5 and Flan-T5 are gated)"
        )
    # transformers computes by these two where they are there, whatever the name above says.
    for key, plain in (("dense_act_fn", "relu"), ("is_gated_act", False)):
        if found.get(key, plain) not in (None, plain):
            problems.append(f"{key}: is {found[key]!r}; T5 v1.0 has {plain!r}")
    if found.get("tie_word_embeddings") is False:
        problems.append(
            "tie_word_embeddings: is false; the output layer of T5 v1.0 is its embedding (v1.1 has "
            "another one, which is not scaled)"
        )
    if found.get("scale_decoder_outputs") is False:
        problems.append("scale_decoder_outputs: is false; T5 v1.0 scales the decoder's output")
    return problems


def write(config: T5Config) -> dict[str, Any]:
    """Return the keys of `config.json`."""
    sizes = {theirs: getattr(config, ours) for ours, (theirs, _) in SIZES.items()}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        **sizes,
        "num_decoder_layers": config.stacks["decoder"],
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": config.init_factor,
        "feed_forward_proj": "relu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


def places(config: T5Config) -> dict[str, Place]:
    """Return where each tensor is kept."""
    found = {"token_embedding.weight": Place("shared.weight", also=TABLES)}
    for stack, depth in config.stacks.items():
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found[f"{stack}.relative_bias.weight"] = Place(first)
        found[f"{stack}.final_norm.weight"] = Place(f"{stack}.final_layer_norm.weight")
        for number in range(depth):
            ours, theirs = f"{stack}.blocks.{number}", f"{stack}.block.{number}.layer"
            parts = [("attention", "SelfAttention", "norm_1")]
            if stack == "decoder":
                parts.append(("cross_attention", "EncDecAttention", "norm_cross"))
            for index, (module, their_module, norm) in enumerate(parts):
                for leaf, their_leaf in ATTENTION.items():
                    place = Place(f"{theirs}.{index}.{their_module}.{their_leaf}.weight")
                    found[f"{ours}.{module}.{leaf}.weight"] = place
                found[f"{ours}.{norm}.weight"] = Place(f"{theirs}.{index}.layer_norm.weight")
            last = f"{theirs}.{len(parts)}"
            found[f"{ours}.ffn.c_fc.weight"] = Place(f"{last}.DenseReluDense.wi.weight")
            found[f"{ours}.ffn.c_proj.weight"] = Place(f"{last}.DenseReluDense.wo.weight")
            found[f"{ours}.norm_2.weight"] = Place(f"{last}.layer_norm.weight")
    return found


T5 = HubFamily(
    model_type="t5",
    label="T5",
    read=read,
    write=write,
    places=places,
    # Older files keep a table that cross-attention never reads.
    ignored=re.compile(
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    ),
)
"""T5 v1.0 with its tied output layer."""
