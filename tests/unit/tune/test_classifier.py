"""The classifier against formulas in float64, and against the encoder that it was made of."""

from dataclasses import replace

import pytest
import torch

from mpotrain.batch import Batch
from mpotrain.models.classifier import Classifier
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.nn.config import MPOSite
from mpotrain.nn.sharing_config import AdapterConfig, SharingConfig

CONFIG = EncoderConfig(
    vocab_size=40,
    context_length=12,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    ffn_size=32,
    embedding_size=8,
    dropout=0.0,
    attention_dropout=0.0,
    init_std=0.3,
    sites=EncoderSites(c_fc=MPOSite(in_modes=(4, 4), out_modes=(4, 8))),
    sharing=SharingConfig(scope="central"),
    adapter=AdapterConfig(rank=2),
)
B, T = 6, 9


def model(num_outputs: int, *, config: EncoderConfig = CONFIG, dropout: float = 0.0) -> Classifier:
    built = Classifier(
        config,
        num_outputs=num_outputs,
        head_dropout=dropout,
        seed=3,
        compute_dtype=torch.float64,
    )
    return built.double()


def batch(num_outputs: int, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([9, 4, 7, 2, 5, 9])
    real = torch.arange(T) < lengths[:, None]
    inputs = torch.randint(1, 40, (B, T), generator=generator) * real
    if num_outputs == 1:
        targets = torch.rand(B, 1, generator=generator)
    else:
        targets = torch.randint(0, num_outputs, (B, 1), generator=generator)
    return Batch(
        inputs=inputs,
        targets=targets,
        loss_mask=torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)[:, None],
        sample_ids=torch.arange(B),
        document_ids=real.long(),
        token_types=((torch.arange(T) > 3) & real).long(),
    )


@pytest.mark.parametrize("num_outputs", [2, 3])
def test_loss_and_confusion_of_classes(num_outputs: int) -> None:
    built, given = model(num_outputs).eval(), batch(num_outputs)
    out = built(given, return_logits=True)
    counts = given.loss_mask[:, 0]
    log_p = out.logits[counts].log_softmax(-1)
    true = given.targets[counts, 0]
    expected = -sum(log_p[row, label] for row, label in enumerate(true))
    assert out.logits.dtype == torch.float64
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-12, atol=0)
    assert int(out.num_tokens) == 5
    table = torch.zeros(num_outputs, num_outputs, dtype=torch.int64)
    for a, b in zip(true, log_p.argmax(-1), strict=True):
        table[a, b] += 1
    assert torch.equal(out.statistics["confusion"], table)
    assert int(out.statistics["correct"]) == int(table.trace())


def test_loss_and_moments_of_values() -> None:
    built, given = model(1).eval(), batch(1)
    out = built(given, return_logits=True)
    counts = given.loss_mask[:, 0]
    x, y = out.logits[counts, 0], given.targets[counts, 0].double()
    torch.testing.assert_close(out.loss_sum, ((x - y) ** 2).sum(), rtol=1e-12, atol=0)
    expected = torch.stack([x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
    torch.testing.assert_close(out.statistics["moments"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_batch_without_rows_that_count(num_outputs: int) -> None:
    given = batch(num_outputs)
    given = replace(given, loss_mask=torch.zeros_like(given.loss_mask))
    out = model(num_outputs).eval()(given)
    assert out.loss_sum.item() == 0.0
    assert int(out.num_tokens) == 0
    assert not any(value.any() for value in out.statistics.values())


def test_training_gives_no_statistics_and_a_gradient_to_every_parameter() -> None:
    built = model(3).train()
    out = built(batch(3))
    assert out.statistics is None
    out.objective.backward()
    missing = {name for name, p in built.named_parameters() if p.grad is None}
    assert missing == set()


def test_dropout_before_the_classifier_acts_in_training_alone() -> None:
    plain, dropping = model(2), model(2, dropout=0.5)
    given = batch(2)
    assert plain.train()(given).loss_sum.item() == plain.eval()(given).loss_sum.item()
    assert dropping.eval()(given).loss_sum.item() == plain.eval()(given).loss_sum.item()
    torch.manual_seed(0)
    assert dropping.train()(given).loss_sum.item() != plain.eval()(given).loss_sum.item()


def test_padding_changes_nothing() -> None:
    built, given = model(2).eval(), batch(2)
    other = given.inputs.masked_fill(given.document_ids == 0, 17)
    scores = built(given, return_logits=True).logits
    torch.testing.assert_close(
        built(replace(given, inputs=other), return_logits=True).logits, scores, rtol=0, atol=0
    )
    # A row alone, cut to its length, gives what it gives among the others.
    alone = Batch(
        inputs=given.inputs[1:2, :4],
        targets=given.targets[1:2],
        loss_mask=given.loss_mask[1:2],
        sample_ids=given.sample_ids[1:2],
        document_ids=given.document_ids[1:2, :4],
        token_types=given.token_types[1:2, :4],
    )
    torch.testing.assert_close(
        built(alone, return_logits=True).logits, scores[1:2], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("pair_head", [True, False])
def test_parameters_are_those_of_the_encoder_without_its_heads(pair_head: bool) -> None:
    config = replace(CONFIG, pair_head=pair_head)
    built = model(3, config=config)
    encoder = dict(Encoder(config, seed=3).named_parameters())
    heads = {name for name in encoder if name.startswith(("mlm_head", "pair_head"))}
    names = {name for name, _ in built.named_parameters()}
    assert heads
    assert names - built.added_parameters == encoder.keys() - heads
    assert built.added_parameters <= names
    assert ("pooler.weight" in built.added_parameters) is not pair_head
    # The same seed draws the same encoder: added layers have generators of their own.
    for name, parameter in built.named_parameters():
        if name not in built.added_parameters:
            assert torch.equal(parameter.float(), encoder[name]), name


def test_the_pooled_state_is_that_of_the_encoder() -> None:
    built = model(2)
    encoder = Encoder(CONFIG, seed=3, compute_dtype=torch.float64).double()
    given = batch(2)
    pooled = encoder.pooled(encoder.hidden(given))
    expected = pooled @ built.classifier.weight.t() + built.classifier.bias
    torch.testing.assert_close(built(given, return_logits=True).logits, expected)
