"""Small T5 models and batches for their tests."""

from __future__ import annotations

from typing import Any

import torch

from mpotrain.batch import Batch
from mpotrain.models.seq2seq import T5
from mpotrain.models.t5_config import T5Config

VOCABULARY = 101
SMALL = T5Config(
    vocab_size=VOCABULARY, hidden_size=24, head_size=5, num_layers=2, num_decoder_layers=3,
    num_heads=4, ffn_size=48, relative_buckets=8, relative_distance=11, dropout=0.0,
)  # fmt: skip
"""Heads do not make up the hidden size, and the decoder is deeper than the encoder."""


def batch(rows: int = 2, source: int = 14, length: int = 9, seed: int = 0, **more: Any) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=torch.rand(rows, length, generator=generator) > 0.2,
        sample_ids=torch.arange(rows),
        encoder_inputs=torch.randint(VOCABULARY, (rows, source), generator=generator),
        **more,
    )


def shaken(model: T5) -> T5:
    """Move every weight away from its start value, norms and relative positions above all."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits_of(model: T5, data: Batch) -> torch.Tensor:
    assert data.encoder_inputs is not None
    memory = model.encode(data.encoder_inputs, data.encoder_document_ids)
    hidden = model.decode(data.inputs, memory, data.document_ids, data.encoder_document_ids)
    return model.logits(hidden)
