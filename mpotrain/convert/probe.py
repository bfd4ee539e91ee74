"""Do two models compute the same? Both are given the same tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpotrain.assemble import build_model
from mpotrain.batch import Batch
from mpotrain.convert.source import Source
from mpotrain.data.dataset import BlendedDataset
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.t5_config import T5Config

PROBE_SEQUENCES, PROBE_LENGTH = 2, 128
"""Size of the batch on which models are compared."""


def data_rows(dataset: BlendedDataset) -> Tensor:
    """Return the first sequences of the data as they stand there, cut short: (B, T)."""
    count = min(PROBE_SEQUENCES, dataset.num_samples)
    length = min(PROBE_LENGTH, dataset.sequence_length)
    return torch.stack([torch.from_numpy(dataset.fixed(n)[:length]) for n in range(count)])


def drawn_rows(config: AnyModel) -> Tensor:
    """Return sequences of random tokens (B, T), the same for every model of a size."""
    longest = config.longest_sequence or PROBE_LENGTH
    size = (PROBE_SEQUENCES, min(PROBE_LENGTH, longest))
    return torch.randint(config.vocab_size, size, generator=torch.Generator().manual_seed(0))


def probe_batch(config: AnyModel, rows: Tensor) -> Batch:
    """Return rows (B, T) of tokens as a micro-batch of a network.

    An encoder reads two segments; the decoder of T5 reads the second half of what its encoder does.
    """
    segments, source = None, None
    if isinstance(config, EncoderConfig):
        segments = torch.zeros_like(rows)
        if config.num_token_types > 1:
            segments[:, rows.shape[1] // 2 :] = 1
    if isinstance(config, T5Config):
        source, rows = rows, rows[:, rows.shape[1] // 2 :]
    return Batch(
        inputs=rows,
        targets=rows,
        loss_mask=torch.ones_like(rows, dtype=torch.bool),
        sample_ids=torch.arange(len(rows)),
        token_types=segments,
        encoder_inputs=source,
    )


def outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return what a model computes of a batch: scores, and those of the order of segments."""
    with torch.no_grad():
        found = {"scores": model(batch, return_logits=True).logits}
        if isinstance(model, Encoder) and model.pair_head is not None:
            found["pairs"] = model.pair_head(model.pooled(model.hidden(batch)))
    return found


def source_outputs(source: Source, batch: Batch) -> dict[str, Tensor]:
    """Return what a source computes of a batch in fp32; heads it lacks are drawn from seed 0."""
    model = build_model(source.config, seed=0, dtype="fp32").eval()
    model.load_state_dict(dict(source.weights), strict=not source.fresh)
    return outputs(model, batch)


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Return the largest difference over the largest value, of what both models compute.

    NaN where either computes NaN or infinity.
    """
    worst = [
        (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
        for name, value in expected.items()
        if name in found
    ]
    # The maximum of tensors keeps NaN, wherever it stands; Python's does not.
    return float(torch.stack(worst).max())
