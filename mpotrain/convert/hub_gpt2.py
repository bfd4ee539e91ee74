"""GPT-2 as Hugging Face keeps it (`transformers.GPT2LMHeadModel`).

Its four matrices of a block are stored (in, out); ours are stored (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mpotrain.convert.hub_family import (
    TANH_GELU,
    HubFamily,
    Place,
    alias_problems,
    fixed_problems,
    read_sizes,
    size_problems,
)
from mpotrain.models.gpt2_config import GPT2Config

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
ALIASES = {
    "hidden_size": ("n_embd", 768),
    "num_hidden_layers": ("n_layer", 12),
    "num_attention_heads": ("n_head", 12),
    "max_position_embeddings": ("n_positions", 1024),
}
"""Second names of sizes."""
MODULES = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm_2": "ln_2",
    "ffn.c_fc": "mlp.c_fc",
    "ffn.c_proj": "mlp.c_proj",
}
BASE = "transformer."


def read(found: Mapping[str, Any]) -> tuple[GPT2Config | None, list[str]]:
    """Return our configuration of a Hugging Face GPT-2, or all reasons against it."""
    problems = fixed_problems(found, FIXED, "GPT-2") + alias_problems(found, ALIASES)
    activation = found.get("activation_function", TANH_GELU[0])
    if activation not in TANH_GELU:
        problems.append(f"activation_function: is {activation!r}, our GPT-2 has {TANH_GELU[0]!r}")
    sizes, wrong = read_sizes(found, SIZES)
    if found.get("n_inner") is not None:
        sizes["ffn_size"] = found["n_inner"]
        wrong += size_problems({"ffn_size": found["n_inner"]})
    if problems or wrong:
        return None, problems + wrong
    config = GPT2Config(**{"ffn_size": 4 * sizes["hidden_size"]} | sizes)
    problems = config.problems("config")
    return (None, problems) if problems else (config, [])


def write(config: GPT2Config) -> dict[str, Any]:
    """Return the keys of `config.json`."""
    sizes = {theirs: getattr(config, ours) for ours, (theirs, _) in SIZES.items()}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **sizes,
        **FIXED,
        "n_inner": config.ffn_size,
        "activation_function": TANH_GELU[0],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_std,
    }


def places(config: GPT2Config) -> dict[str, Place]:
    """Return where each tensor is kept."""
    found = {
        "token_embedding.weight": Place(f"{BASE}wte.weight", also=("lm_head.weight",)),
        "position_embedding": Place(f"{BASE}wpe.weight"),
    }
    for leaf in ("weight", "bias"):
        found[f"final_norm.{leaf}"] = Place(f"{BASE}ln_f.{leaf}")
        for layer in range(config.num_layers):
            for ours, theirs in MODULES.items():
                turned = leaf == "weight" and not ours.startswith("norm")
                name = f"{BASE}h.{layer}.{theirs}.{leaf}"
                found[f"blocks.{layer}.{ours}.{leaf}"] = Place(name, turned)
    return found


GPT2 = HubFamily(
    model_type="gpt2",
    label="GPT-2",
    read=read,
    write=write,
    places=places,
    base=BASE,
    # The causal mask, which older files keep as a tensor.
    ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
)
"""GPT-2 with its tied output layer."""
