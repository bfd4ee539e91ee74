"""The encoder against plain formulas, and what its losses, masks and modes must keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from unit.models.encoder_cases import (
    ADAPTER,
    CENTRAL_TIED,
    DEEPNORM,
    EVERY_KIND,
    LENGTH,
    SOME_DENSE,
    VOCABULARY,
    bare,
    batch,
    build,
    encoder_config,
    reference_hidden,
)

from mpotrain.batch import Batch
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.nn.sharing_config import SharingConfig

MPOBERT = encoder_config(sharing=CENTRAL_TIED, adapter=ADAPTER)


@pytest.mark.parametrize("config", [*EVERY_KIND, encoder_config(start=DEEPNORM)])
def test_hidden_states_are_those_of_plain_formulas(config: EncoderConfig) -> None:
    model = build(config).eval()
    for data in (batch(), bare(batch().inputs)):
        torch.testing.assert_close(
            model.hidden(data), reference_hidden(model, data), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("config", EVERY_KIND[::3])
def test_every_parameter_has_the_gradient_of_plain_formulas(config: EncoderConfig) -> None:
    model, data = build(config), batch()
    weight = torch.randn(3, LENGTH, 16, dtype=torch.float64)
    (model.hidden(data) * weight).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    (reference_hidden(model, data) * weight).sum().backward()
    assert len(got) > 20
    for name, parameter in model.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sites", [None, SOME_DENSE])
def test_loss_is_the_sum_over_masked_tokens_alone(sites: EncoderSites | None) -> None:
    model = build(encoder_config(sites=sites) if sites else MPOBERT)
    data = batch()
    out = model(data, return_logits=True)
    assert out.logits is not None
    # The head by hand: transform, activation, norm, the tied table and a bias.
    head, hidden = model.mlm_head, reference_hidden(model, data)
    x = functional.gelu(functional.linear(hidden, head.transform.weight, head.transform.bias),
                        approximate="tanh")  # fmt: skip
    x = functional.layer_norm(x, (8,), head.norm.weight, head.norm.bias, 1e-12)
    ids = torch.arange(VOCABULARY)
    scores = x @ model.token_embedding(ids, torch.float64).t() + head.bias
    torch.testing.assert_close(out.logits, scores, rtol=1e-9, atol=1e-9)
    picked = scores.log_softmax(-1).gather(-1, data.targets[..., None])[..., 0]
    expected = -picked[data.loss_mask].sum()
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(data).loss_sum, expected, rtol=1e-9, atol=1e-9)
    assert int(out.num_tokens) == int(data.loss_mask.sum()) > 0


def test_statistics_and_auxiliary_loss_of_pairs() -> None:
    model, data = build(MPOBERT), batch()
    assert data.pair_labels is not None
    places = (data.pair_labels != -100).nonzero()
    assert len(places) == 4
    hidden = model.hidden(data)
    scores = torch.stack([
        model.pair_head(torch.tanh(model.pooler(hidden[row, column])))
        for row, column in places.tolist()
    ])  # fmt: skip
    wanted = data.pair_labels[data.pair_labels != -100]
    losses = functional.cross_entropy(scores, wanted, reduction="none")
    for mode in (True, False):
        out = model.train(mode)(data)
        told = out.statistics or {}
        assert (int(told["num_pairs"]), int(told["pair_correct"])) == (
            4,
            int((scores.argmax(-1) == wanted).sum()),
        )
        torch.testing.assert_close(told["pair_loss"], losses.sum().detach())
        assert not told["pair_loss"].requires_grad
        if mode:
            assert out.auxiliary_sum is not None
            torch.testing.assert_close(out.auxiliary_sum, losses.mean() * data.num_tokens)
            assert "correct" not in told
        else:
            assert out.auxiliary_sum is None
            logits = model(data, return_logits=True).logits
            right = (logits.argmax(-1) == data.targets) & data.loss_mask
            assert int(told["correct"]) == int(right.sum())


def test_first_tokens_are_pooled() -> None:
    model = build(MPOBERT)
    hidden = model.hidden(batch())
    torch.testing.assert_close(model.pooled(hidden), torch.tanh(model.pooler(hidden[:, 0])))
    with pytest.raises(ValueError, match="pair_head"):
        build(replace(MPOBERT, pair_head=False)).pooled(hidden)


@pytest.mark.parametrize("sites", [EncoderSites(), SOME_DENSE])
def test_without_targets_and_pairs_every_parameter_still_has_a_gradient(
    sites: EncoderSites,
) -> None:
    model = build(encoder_config(sites=sites))
    data = batch()
    for labels in (None, torch.full((3, LENGTH), -100)):
        model.zero_grad(set_to_none=True)
        nothing = replace(data, loss_mask=torch.zeros_like(data.loss_mask), pair_labels=labels)
        out = model(nothing)
        told = out.statistics or {}
        assert (out.objective.item(), int(out.num_tokens)) == (0.0, 0)
        assert (int(told["num_pairs"]), float(told["pair_loss"])) == (0, 0.0)
        out.objective.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_statistics_have_one_set_of_names_and_shapes_in_a_mode() -> None:
    model, data = build(MPOBERT), batch()
    without = replace(data, pair_labels=None)
    for mode in (True, False):
        model.train(mode)
        one, other = (model(d).statistics or {} for d in (data, without))
        assert {n: (v.shape, v.dtype) for n, v in one.items()} == {
            n: (v.shape, v.dtype) for n, v in other.items()
        }


def test_packed_documents_are_as_alone_and_padding_has_no_influence() -> None:
    model, data = build(MPOBERT).eval(), batch()
    packed = model.hidden(data)
    assert data.token_types is not None
    first = Batch(
        data.inputs[:, :6], data.targets[:, :6], data.loss_mask[:, :6], data.sample_ids,
        token_types=data.token_types[:, :6],
    )  # fmt: skip
    torch.testing.assert_close(packed[:, :6], model.hidden(first))
    second = bare(data.inputs[:, 6:10])
    torch.testing.assert_close(packed[:, 6:10], model.hidden(second))
    padded = data.inputs.clone()
    padded[:, 10:] = 7
    assert torch.equal(model.hidden(replace(data, inputs=padded))[:, :10], packed[:, :10])
    # Negative control: without documents the rows do meet.
    together = model.hidden(replace(data, document_ids=None))
    assert not torch.allclose(together[:, :6], packed[:, :6])


def test_tokens_see_both_sides() -> None:
    model, tokens = build(MPOBERT).eval(), batch().inputs
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCABULARY
    before, after = model.hidden(bare(tokens)), model.hidden(bare(changed))
    assert bool((before != after).any(-1).all())


def test_dropout_acts_in_training_only() -> None:
    data = batch()
    for rates in ({"dropout": 0.3}, {"attention_dropout": 0.3}):
        model = build(encoder_config(**rates))
        assert model(data).loss_sum.item() != model(data).loss_sum.item()
        model.eval()
        assert model(data).loss_sum.item() == model(data).loss_sum.item()


@pytest.mark.parametrize("sharing", [CENTRAL_TIED, SharingConfig(scope="all", groups=2)])
def test_recomputed_layers_give_the_same_gradients(sharing: SharingConfig) -> None:
    config = encoder_config(sharing=sharing, adapter=ADAPTER, dropout=0.2, attention_dropout=0.1)
    gradients = []
    for recompute in (False, True):
        model = build(replace(config, activation_checkpointing=recompute))
        calls: list[object] = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(None))
        torch.manual_seed(5)
        model(batch()).objective.backward()
        assert len(calls) == (8 if recompute else 4)
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-12)


def test_bf16_compute_is_close_to_fp32() -> None:
    data = batch()
    fp32 = Encoder(MPOBERT, seed=1)
    bf16 = Encoder(MPOBERT, seed=1, compute_dtype=torch.bfloat16)
    assert bf16.hidden(data).dtype == torch.bfloat16
    out = bf16(data)
    assert out.loss_sum.dtype == torch.float32
    assert out.objective.item() == pytest.approx(fp32(data).objective.item(), rel=1e-2)
    out.objective.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in bf16.parameters())


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"13 tokens.*12 positions"):
        build(MPOBERT).hidden(bare(torch.zeros(1, LENGTH + 1, dtype=torch.int64)))
