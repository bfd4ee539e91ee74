"""Random GPT-2 models as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

SIZES = {"vocab_size": 96, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4}


def random_gpt2(**changes: Any) -> transformers.GPT2LMHeadModel:
    """Return a GPT-2 in which no weight, bias or norm has the value that it starts with."""
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a folder's weights by hand."""
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
