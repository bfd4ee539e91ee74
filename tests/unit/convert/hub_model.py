"""Random models as transformers writes them, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from mpotrain.convert.hub import hub_source
from mpotrain.convert.probe import probe_batch, source_outputs
from mpotrain.convert.source import Source
from mpotrain.models.config import AnyModel

SIZES = {"vocab_size": 96, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4}
ENCODER_SIZES = {
    "vocab_size": 96,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
T5_SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 56,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(5))


def moved(model: torch.nn.Module) -> Any:
    """Return a model in which no weight, bias or norm has the value that it starts with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def random_gpt2(**changes: Any) -> transformers.GPT2LMHeadModel:
    """Return a random GPT-2."""
    torch.manual_seed(1)
    return moved(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | changes)))


def random_albert(
    kind: type[Any] = transformers.AlbertForPreTraining, **changes: Any
) -> transformers.AlbertForPreTraining:
    """Return a random ALBERT."""
    torch.manual_seed(1)
    return moved(
        kind(transformers.AlbertConfig(**ENCODER_SIZES | {"embedding_size": 16} | changes))
    )


def random_bert(
    kind: type[Any] = transformers.BertForPreTraining, **changes: Any
) -> transformers.BertForPreTraining:
    """Return a random BERT."""
    torch.manual_seed(1)
    return moved(kind(transformers.BertConfig(**ENCODER_SIZES | changes)))


def random_t5(**changes: Any) -> transformers.T5ForConditionalGeneration:
    """Return a random T5 v1.0."""
    torch.manual_seed(1)
    return moved(
        transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZES | changes))
    )


def read(folder: Path) -> Source:
    """Read a folder as our model."""
    return hub_source(folder, "the model")


def ours(source: Source) -> dict[str, torch.Tensor]:
    """Return what our model of a source computes of `TOKENS`."""
    return source_outputs(source, probe_batch(source.config, TOKENS))


def theirs(model: torch.nn.Module, config: AnyModel) -> dict[str, torch.Tensor]:
    """Return what a model of transformers computes of `TOKENS`, under our names."""
    batch = probe_batch(config, TOKENS)
    with torch.no_grad():
        if batch.encoder_inputs is not None:
            found = model(input_ids=batch.encoder_inputs, decoder_input_ids=batch.inputs)
        elif batch.token_types is not None:
            found = model(input_ids=batch.inputs, token_type_ids=batch.token_types)
        else:
            found = model(batch.inputs)
    names = {"logits": "scores", "prediction_logits": "scores", "sop_logits": "pairs",
             "seq_relationship_logits": "pairs"}  # fmt: skip
    return {ours: found[name] for name, ours in names.items() if name in found}


def assert_same(source: Source, model: torch.nn.Module) -> None:
    """Hold our model of a source against one of transformers."""
    expected, found = theirs(model, source.config), ours(source)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a folder's weights by hand."""
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def assert_every_tensor_matters(source: Source, skipped: Callable[[str], bool]) -> None:
    """Make sure that no tensor could be left out, turned or exchanged without being noticed.

    Args:
        source: a model.
        skipped: tells the names that are not tried.
    """
    expected = ours(source)
    for name in source.weights:
        if skipped(name):
            continue
        changed = dict(source.weights)
        changed[name] = changed[name].flatten().roll(1).view_as(changed[name])
        found = ours(replace(source, weights=changed))
        assert max(float((found[k] - expected[k]).abs().max()) for k in expected) > 1e-4, name
