"""Activation functions by the names that run files use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor
from torch.nn import functional

ActivationName = Literal["gelu_tanh", "gelu", "relu"]


def activation(name: ActivationName) -> Callable[[Tensor], Tensor]:
    """Return an activation function.

    Args:
        name: `gelu_tanh` (GPT-2, ALBERT: the approximation by tanh), `gelu` (exact, BERT) or
            `relu` (T5 v1.0).
    """
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
        "gelu": functional.gelu,
        "relu": functional.relu,
    }
    return functions[name]
