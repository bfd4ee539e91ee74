"""Faster parts of transformer-engine and apex: taken where they are there, needed nowhere.

Each function returns a class, or None where the engine has to use its own: with `extensions =
"off"`, without CUDA, or without the package. Own and foreign parts must compute the same.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch

Extensions = Literal["auto", "off"]


def core_attention_class(extensions: Extensions) -> type[Any] | None:
    """Return megatron-core's wrapper of transformer-engine's attention, or None.

    It must equal `softmax(scale * q k^T + mask) v` with megatron-core's shapes [s, b, heads, head
    size], for heads without a bias on the scores.

    Args:
        extensions: setting of the engine.
    """
    return _wrapper("TEDotProductAttention", extensions)


def norm_class(extensions: Extensions) -> type[Any] | None:
    """Return megatron-core's maker of transformer-engine's LayerNorm and RMSNorm, or None.

    It must equal `mpotrain.nn.norm.layer_norm`, or `torch.nn.functional.rms_norm`, over the last
    dimension in fp32, with the result in the dtype of the input.

    Args:
        extensions: setting of the engine.
    """
    return _wrapper("TENorm", extensions)


def fused_adam_class(extensions: Extensions) -> type[torch.optim.Optimizer] | None:
    """Return the FusedAdam of transformer-engine, else that of apex, else None.

    With `adam_w_mode=True` (as by default) it must equal `torch.optim.AdamW`, with the same state
    `exp_avg` and `exp_avg_sq` of each parameter; the counter `step` stands in the groups.

    Args:
        extensions: setting of the engine.
    """
    if not _wanted(extensions):
        return None
    for module in ("transformer_engine.pytorch.optimizers", "apex.optimizers"):
        found = _find(module, "FusedAdam")
        if found is not None:
            return found
    return None


def _wrapper(name: str, extensions: Extensions) -> type[Any] | None:
    """Return a class of megatron-core around transformer-engine.

    The module of these classes can be imported without transformer-engine, so its absence must be
    asked for apart.
    """
    if (
        not _wanted(extensions)
        or _find("transformer_engine.pytorch", "DotProductAttention") is None
    ):
        return None
    return _find("megatron.core.extensions.transformer_engine", name)


def _wanted(extensions: Extensions) -> bool:
    return extensions == "auto" and torch.cuda.is_available()


def _find(module: str, name: str) -> type[Any] | None:
    """Return a class of a module; None if either is missing or cannot be imported.

    Compiled extensions that do not fit torch or the driver raise OSError or RuntimeError.
    """
    try:
        found: type[Any] | None = getattr(import_module(module), name, None)
    except (ImportError, OSError, RuntimeError):
        return None
    return found
