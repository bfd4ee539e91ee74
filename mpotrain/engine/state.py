"""Pieces of training state that all engines export and import alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpotrain.engine.base import MOMENTS, WEIGHT, StateReader
from mpotrain.errors import CheckpointError


def read_checked(
    read: StateReader, name: str, shape: tuple[int, ...], num_updates: int
) -> Mapping[str, Tensor]:
    """Read one parameter's state and hold it against the model.

    Args:
        read: source of whole tensors by kind.
        name: logical name.
        shape: shape in the model.
        num_updates: 0 means that no moments are needed.

    Returns:
        The tensors by kind, all fp32 and of the right shape.

    Raises:
        CheckpointError: a kind is missing, or a shape or dtype differs.
    """
    tensors = read(name)
    kinds = (WEIGHT, *MOMENTS) if num_updates else (WEIGHT,)
    for kind in kinds:
        if kind not in tensors:
            raise CheckpointError(
                f"{name}: {kind} is missing after {num_updates} updates; the checkpoint has "
                f"{', '.join(tensors) or 'nothing'} for it"
            )
        tensor = tensors[kind]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise CheckpointError(
                f"{name}: {kind} is {tensor.dtype} {tuple(tensor.shape)} in the checkpoint, but "
                f"the model needs torch.float32 {shape}"
            )
    return {kind: tensors[kind] for kind in kinds}


def fresh_adam_state(
    group: Mapping[str, Any], parameter: Tensor, num_updates: int
) -> dict[str, Tensor]:
    """Build the state that AdamW and LAMB hold for a parameter, with zero moments.

    Args:
        group: the parameter's group; fused and capturable AdamW count on the device.
        parameter: what the optimizer updates (a whole parameter or a flat partition).
        num_updates: Adam's counter.
    """
    on_device = group.get("fused") or group.get("capturable")
    device = parameter.device if on_device else torch.device("cpu")
    state = {"step": torch.tensor(float(num_updates), dtype=torch.float32, device=device)}
    for moment in MOMENTS:
        state[moment] = torch.zeros_like(parameter.detach())
    return state


def host_copy(tensor: Tensor) -> Tensor:
    """Return an fp32 copy in host memory that shares nothing with `tensor`."""
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
