"""An encoder as a dense one that shares nothing: rebuilt matrices with their adapters in them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import (
    BLOCK_NORMS,
    MODULES,
    EncoderConfig,
    EncoderSites,
)
from mpotrain.nn.config import DenseSite
from mpotrain.nn.encoder_block import Given
from mpotrain.nn.linear import DenseLinear, TensorizedEmbedding, TensorizedLinear
from mpotrain.nn.sharing import SharedLinear, folded_weight
from mpotrain.nn.sharing_config import BLOCK_FAMILIES, SharingConfig
from mpotrain.tensor.contract import rebuild

LAYER_PARTS = ("blocks.", "bank.", "tied.", "adapters.", "token_embedding.")
"""First parts of the names of all parameters that are not taken over as they are."""


def folded_config(config: EncoderConfig) -> EncoderConfig:
    """Return the dense, unshared encoder without adapters that computes what another one does."""
    dense = {
        family: DenseSite(bias=getattr(config.sites, family).bias) for family in BLOCK_FAMILIES
    }
    start = replace(config.start, auxiliary_scale="none", unscaled_layers=0, deeper="copies")
    return replace(
        config, sites=EncoderSites(**dense), sharing=SharingConfig(), adapter=None, start=start
    )


@torch.no_grad()
def folded_state(model: Encoder) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Fold adapters, cores and everything shared into the matrices of a dense encoder.

    Args:
        model: an encoder with whole weights.

    Returns:
        The configuration of the dense encoder and its weights by logical name; matrices are
        computed in float64 and rounded once, nothing shares memory with the model.
    """
    state = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not name.startswith(LAYER_PARTS)
    }
    state["token_embedding.weight"] = _table(model.token_embedding)
    for layer in range(model.config.num_layers):
        block, given = model.blocks[model.config.block(layer)], model.given(layer)
        for family in BLOCK_FAMILIES:
            name = f"blocks.{layer}.{MODULES[family]}"
            owner = block.get_submodule(MODULES[family])
            state |= {f"{name}.{leaf}": v for leaf, v in _matrix(owner, family, given).items()}
        for norm in BLOCK_NORMS:
            for leaf in ("weight", "bias"):
                if norm in given:
                    vector = given[norm][leaf]
                else:
                    vector = block.get_parameter(f"{norm}.{leaf}")
                state[f"blocks.{layer}.{norm}.{leaf}"] = vector.detach().clone()
    return folded_config(model.config), state


def _matrix(owner: nn.Module, family: str, given: Given) -> dict[str, Tensor]:
    if not isinstance(owner, DenseLinear | TensorizedLinear | SharedLinear):
        raise TypeError(f"{family} is a {type(owner).__name__}, not a linear layer")
    parts = given.get(family, {})
    weight = folded_weight(owner, parts).t()
    found = {"weight": weight.clone(memory_format=torch.contiguous_format)}
    bias = parts.get("bias", owner.bias)
    if bias is not None:
        found["bias"] = bias.detach().clone()
    return found


def _table(embedding: nn.Module) -> Tensor:
    if isinstance(embedding, TensorizedEmbedding):
        cores = [core.double() for core in embedding.cores]
        return rebuild(cores, embedding.spec).to(embedding.cores[0].dtype)
    return embedding.get_parameter("weight").detach().clone()
