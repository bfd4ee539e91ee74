"""Pairs of segments count alike wherever micro-batches are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mpotrain.batch import NO_PAIR, Batch
from mpotrain.engine.config import LocalConfig
from mpotrain.engine.local import LocalEngine
from mpotrain.engine.targets import Targets, count_targets
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.parallel.ranks import World
from mpotrain.train.config import AdamWConfig
from mpotrain.train.optim import build_optimizer

WORLD = World(0, 1, 0, torch.device("cpu"))
CONFIG = EncoderConfig(
    vocab_size=20, context_length=8, hidden_size=8, num_layers=2, num_heads=2, ffn_size=16,
    dropout=0.0, attention_dropout=0.0, init_std=0.3,
)  # fmt: skip


def uneven_rows() -> Batch:
    """Four rows with 5, 1, 0 and 2 targets and 1, 2, 1 and 0 pairs."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 20, (4, 8), generator=generator)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    for row, count in enumerate((5, 1, 0, 2)):
        mask[row, 1 : 1 + count] = True
    labels = torch.full((4, 8), NO_PAIR)
    labels[0, 0], labels[1, 0], labels[1, 4], labels[2, 0] = 1, 0, 1, 1
    return Batch(tokens, tokens.flip(0), mask, torch.arange(4), pair_labels=labels)


def rows(batch: Batch, first: int, last: int) -> Batch:
    cut = {name: getattr(batch, name)[first:last] for name in ("inputs", "targets", "loss_mask")}
    assert batch.pair_labels is not None
    labels, ids = batch.pair_labels[first:last], batch.sample_ids[first:last]
    return Batch(**cut, sample_ids=ids, pair_labels=labels)


def trained(micro: int) -> tuple[dict[str, torch.Tensor], float]:
    """Return the weights after a step whose rows come in micro-batches of some size."""
    model = Encoder(CONFIG, seed=1)
    optimizer = build_optimizer(model, AdamWConfig())
    engine = LocalEngine(
        model, optimizer, config=LocalConfig(device="cpu"), world=WORLD, seed=0, clip_norm=None
    )
    batch = uneven_rows()
    result = engine.step([rows(batch, n, n + micro) for n in range(0, 4, micro)], lr=0.1, step=0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, result.grad_norm


@pytest.mark.parametrize("micro", [1, 2])
def test_the_step_does_not_depend_on_the_size_of_micro_batches(micro: int) -> None:
    (whole, norm), (cut, cut_norm) = trained(4), trained(micro)
    assert cut_norm == pytest.approx(norm, rel=1e-5)
    for name, tensor in whole.items():
        if not name.endswith("key.bias"):  # its gradient is rounding alone
            torch.testing.assert_close(cut[name], tensor, rtol=1e-4, atol=1e-4)


def test_objective_is_the_mean_of_targets_plus_the_mean_of_pairs() -> None:
    model, batch = Encoder(CONFIG, seed=1), uneven_rows()
    targets = count_targets([batch], WORLD)
    assert targets == Targets(8, 4)
    out = model(targets.weigh(batch))
    told = out.statistics
    expected = out.loss_sum / 8 + told["pair_loss"] / 4
    torch.testing.assert_close(out.objective / 8, expected)
    torch.testing.assert_close(model(batch).objective, out.objective)  # alone it is the whole


def test_batches_without_pairs_are_left_alone() -> None:
    batch = replace(uneven_rows(), pair_labels=None)
    assert count_targets([batch, batch], WORLD) == Targets(16, 0)
    assert Targets(16, 0).weigh(batch) is batch
    none = replace(uneven_rows(), pair_labels=torch.full((4, 8), NO_PAIR))
    out = Encoder(CONFIG, seed=1)(Targets(8, 0).weigh(none))
    assert torch.isfinite(out.objective)
    assert float(out.auxiliary_sum.detach()) == 0.0
