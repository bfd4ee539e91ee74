"""T5 against transformers' implementation with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from t5_cases import SMALL, batch, logits_of, shaken
from torch import nn

from mpotrain.models.seq2seq import T5
from mpotrain.models.t5_config import T5Config

transformers = pytest.importorskip("transformers")
NAMES = {
    "shared.": "token_embedding.",
    ".block.": ".blocks.",
    ".SelfAttention.relative_attention_bias.": ".relative_bias.",
    ".SelfAttention.": ".attention.",
    ".EncDecAttention.": ".cross_attention.",
    ".q.": ".query.",
    ".k.": ".key.",
    ".v.": ".value.",
    ".o.": ".out.",
    ".DenseReluDense.wi.": ".ffn.c_fc.",
    ".DenseReluDense.wo.": ".ffn.c_proj.",
    ".final_layer_norm.": ".final_norm.",
}
NORMS = {
    "encoder": ("norm_1", "norm_2"),
    "decoder": ("norm_1", "norm_cross", "norm_2"),
}


def our_name(name: str) -> str:
    """Return our name of a parameter of `T5ForConditionalGeneration`."""
    for old, new in NAMES.items():
        name = name.replace(old, new)
    if "relative_bias" in name:
        return f"{name.partition('.')[0]}.relative_bias.weight"
    parts = name.split(".")
    if "layer" in parts:
        at = parts.index("layer")
        if parts[at + 2] == "layer_norm":
            parts[at + 2] = NORMS[parts[0]][int(parts[at + 1])]
        del parts[at : at + 2]
    return ".".join(parts)


def twins(config: T5Config) -> tuple[T5, Any]:
    """Return a model of ours and one of transformers with the same weights."""
    model = shaken(T5(config, seed=3))
    reference = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.hidden_size,
            d_kv=config.head_size,
            d_ff=config.ffn_size,
            num_layers=config.num_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relative_buckets,
            relative_attention_max_distance=config.relative_distance,
            dropout_rate=config.dropout,
            layer_norm_epsilon=config.norm_eps,
            feed_forward_proj="relu",
            tie_word_embeddings=True,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            attn_implementation="eager",
        )
    )
    ours = dict(model.named_parameters())
    names = [our_name(name) for name, _ in reference.named_parameters()]
    assert sorted(names) == sorted(ours)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(ours[our_name(name)])
    return model, reference


ODD = replace(SMALL, hidden_size=20, head_size=7, num_heads=3, relative_buckets=12, norm_eps=1e-3)
LIKE_BASE = replace(
    SMALL, hidden_size=32, head_size=8, num_decoder_layers=None, relative_buckets=32,
    relative_distance=128,
)  # fmt: skip


@pytest.mark.parametrize("config", [SMALL, ODD, LIKE_BASE])
def test_logits_loss_and_gradients_equal_hugging_face_t5(config: T5Config) -> None:
    model, reference = twins(config)
    data = batch(3, source=60, length=40)
    assert data.encoder_inputs is not None
    expected = reference(
        input_ids=data.encoder_inputs,
        decoder_input_ids=data.inputs,
        labels=data.targets.masked_fill(~data.loss_mask, -100),
    )
    out = model(data, return_logits=True)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss_sum / out.num_tokens, expected.loss, rtol=1e-5, atol=1e-5)
    (out.loss_sum / out.num_tokens).backward()
    expected.loss.backward()
    ours = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        wanted = parameter.grad
        gap = (ours[our_name(name)].grad - wanted).abs().max() / wanted.abs().max()
        assert float(gap) < 1e-4, name


def test_padding_that_is_masked_equals_hugging_face() -> None:
    model, reference = twins(SMALL)
    data = batch(2)
    seen = torch.ones(2, 14, dtype=torch.int64)
    seen[1, 9:] = 0
    documents = torch.ones_like(data.inputs)
    data = replace(data, encoder_document_ids=seen, document_ids=documents)
    expected = reference(
        input_ids=data.encoder_inputs, attention_mask=seen, decoder_input_ids=data.inputs
    )
    torch.testing.assert_close(logits_of(model, data), expected.logits, rtol=1e-5, atol=1e-5)


def test_dropout_acts_where_it_does_in_hugging_face() -> None:
    """Both draw from one generator: the same masks in the same places, in the same order."""
    config = replace(SMALL, dropout=0.3)
    model, reference = twins(config)
    data = batch(2)
    losses = []
    for network in (model.train(), reference.train()):
        torch.manual_seed(5)
        losses.append(_loss(network, data))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(_loss(model.eval(), data), rel=1e-3)


def _loss(network: nn.Module, data: Any) -> float:
    if isinstance(network, T5):
        out = network(data)
        return float((out.loss_sum / out.num_tokens).detach())
    labels = data.targets.masked_fill(~data.loss_mask, -100)
    out = network(input_ids=data.encoder_inputs, decoder_input_ids=data.inputs, labels=labels)
    return float(out.loss.detach())


def test_greedy_text_equals_hugging_face() -> None:
    """Encode once, decode again for every token."""
    model, reference = twins(LIKE_BASE)  # transformers' cache wants stacks of one depth
    model.eval()
    for table in (model.token_embedding.weight, reference.shared.weight):
        table.data.mul_(0.1)  # else the tied output repeats the last token for ever
    source = batch(2).encoder_inputs
    assert source is not None
    expected = reference.eval().generate(
        input_ids=source, attention_mask=torch.ones_like(source), max_new_tokens=12,
        do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.no_grad():
        memory = model.encode(source)
        written = torch.zeros(2, 1, dtype=torch.int64)
        for _ in range(12):
            scores = model.logits(model.decode(written, memory)[:, -1])
            written = torch.cat([written, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, expected)
    assert len(set(written[0].tolist())) > 2
