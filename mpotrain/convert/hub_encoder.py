"""What Hugging Face's BERT and ALBERT have in common, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpotrain.convert.hub_family import (
    ACTIVATIONS,
    TANH_GELU,
    fixed_problems,
    positive_problem,
    read_sizes,
)
from mpotrain.models.encoder_config import EncoderConfig

FIXED: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
}
"""What our encoder does not leave open; absent keys have these values."""
KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "num_token_types": "type_vocab_size",
}
"""Our sizes and their keys in `config.json`."""
HEADS = ("mlm_head.", "pooler.", "pair_head.")


def read_settings(
    found: Mapping[str, Any], label: str, defaults: Mapping[str, int], activation: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that both kinds share, and everything ours cannot compute.

    Args:
        found: content of `config.json`.
        label: the kind, for people.
        defaults: what absent sizes mean, by our names.
        activation: what an absent activation means.
    """
    problems = fixed_problems(found, FIXED, label)
    keys = {ours: (theirs, defaults[ours]) for ours, theirs in KEYS.items()}
    sizes, wrong = read_sizes(found, keys)
    name = found.get("hidden_act", activation)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        problems.append(f"hidden_act: is {name!r}, our encoder has {', '.join(ACTIVATIONS)}")
    problems += wrong + positive_problem(found, "layer_norm_eps")
    settings: dict[str, Any] = {
        **sizes,
        "activation": ACTIVATIONS.get(str(name)),
        "norm_eps": found.get("layer_norm_eps", 1e-12),
    }
    return settings, problems


def write_settings(config: EncoderConfig) -> dict[str, Any]:
    """Return the keys of `config.json` that both kinds share."""
    activation = TANH_GELU[0] if config.activation == "gelu_tanh" else config.activation
    return {
        **{theirs: getattr(config, ours) for ours, theirs in KEYS.items()},
        "hidden_act": activation,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }


def architecture(config: EncoderConfig, label: str) -> list[str]:
    """Return the class that has exactly the heads of a model.

    Args:
        config: of the model.
        label: `Albert` or `Bert`.
    """
    return [f"{label}ForPreTraining" if config.pair_head else f"{label}ForMaskedLM"]
