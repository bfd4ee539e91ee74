"""Hugging Face ALBERT and BERT read into our encoder, held against transformers itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub_model import (
    TOKENS,
    assert_every_tensor_matters,
    assert_same,
    random_albert,
    random_bert,
    read,
    write_tensors,
)
from safetensors.torch import load_file

from mpotrain.assemble import build_model
from mpotrain.convert.probe import probe_batch
from mpotrain.errors import CheckpointError
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig

MODELS: dict[str, Callable[..., torch.nn.Module]] = {"albert": random_albert, "bert": random_bert}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    {"hidden_act": "gelu_new", "type_vocab_size": 3},
    {"hidden_act": "relu", "num_attention_heads": 2},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_transformers(
    name: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    model = MODELS[name](**variant)
    model.save_pretrained(tmp_path)
    source = read(tmp_path)
    assert source.fresh == ()
    assert_same(source, model)
    assert source.config.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_shared_layers(groups: int, tmp_path: Path) -> None:
    model = random_albert(num_hidden_groups=groups)
    model.save_pretrained(tmp_path)
    source = read(tmp_path)
    assert isinstance(source.config, EncoderConfig)
    assert (source.config.sharing.scope, source.config.sharing.groups) == ("all", groups)
    assert_same(source, model)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_tensor_matters(name: str, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    # The bias of the keys shifts all scores of a query alike.
    assert_every_tensor_matters(
        read(tmp_path), lambda n: n.startswith(("blocks.1", "blocks.2")) or "key.bias" in n
    )


@pytest.mark.parametrize(
    ("model", "fresh"),
    [
        (lambda: random_albert(transformers.AlbertForMaskedLM), {"pooler", "pair_head"}),
        (lambda: random_albert(transformers.AlbertModel), {"mlm_head", "pair_head"}),
        (lambda: random_bert(transformers.BertForMaskedLM), {"pooler", "pair_head"}),
        (lambda: random_bert(transformers.BertModel), {"mlm_head", "pair_head"}),
    ],
)
def test_models_without_all_heads(
    model: Callable[[], Any], fresh: set[str], tmp_path: Path
) -> None:
    given = model()
    given.save_pretrained(tmp_path)
    source = read(tmp_path)
    assert {name.partition(".")[0] for name in source.fresh} == fresh
    assert not set(source.fresh) & set(source.weights)
    if "mlm_head" not in fresh:
        assert_same(source, given)
        return
    encoder = build_model(source.config, seed=0, dtype="fp32").eval()
    assert isinstance(encoder, Encoder)
    encoder.load_state_dict(dict(source.weights), strict=False)
    batch = probe_batch(source.config, TOKENS)
    with torch.no_grad():
        expected = given(input_ids=batch.inputs, token_type_ids=batch.token_types)
        hidden = encoder.hidden(batch)
        torch.testing.assert_close(hidden, expected.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            encoder.pooled(hidden), expected.pooler_output, rtol=0, atol=1e-5
        )


def test_files_of_the_first_tensorflow_checkpoints(tmp_path: Path) -> None:
    """Norms are called gamma and beta, position ids and the tied output layer are stored."""
    model = random_bert()
    model.save_pretrained(tmp_path)
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in model.state_dict().items()
    }
    tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
    write_tensors(tmp_path, tensors)
    assert "cls.predictions.decoder.bias" in load_file(tmp_path / "model.safetensors")
    assert_same(read(tmp_path), model)


def test_a_tied_tensor_may_stand_under_its_other_name_alone(tmp_path: Path) -> None:
    model = random_albert()
    model.save_pretrained(tmp_path)
    tensors = dict(model.state_dict())
    del tensors["albert.embeddings.word_embeddings.weight"], tensors["predictions.bias"]
    write_tensors(tmp_path, tensors)
    assert_same(read(tmp_path), model)
    tensors["predictions.bias"] = tensors["predictions.decoder.bias"] + 1
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"decoder\.bias: differs from predictions\.bias"):
        read(tmp_path)


def test_a_head_that_is_only_half_there_is_refused(tmp_path: Path) -> None:
    model = random_albert()
    model.save_pretrained(tmp_path)
    tensors = dict(model.state_dict())
    del tensors["predictions.dense.weight"]
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"mlm_head\.transform\.weight: the model has it"):
        read(tmp_path)


def test_features_that_ours_has_not_are_all_listed(tmp_path: Path) -> None:
    random_albert().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "hidden_act": "swish",
        "inner_group_num": 2,
        "position_embedding_type": "relative_key",
        "layer_norm_eps": 0,
        "num_hidden_groups": "one",
        "num_attention_heads": True,
    }
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    for word in (
        "hidden_act: is 'swish'",
        "inner_group_num: is 2, our ALBERT has 1",
        "position_embedding_type: is 'relative_key'",
        "layer_norm_eps: is 0, no positive number",
        "groups: is 'one', no number",
        "num_heads: is True, no number",
    ):
        assert word in str(caught.value)
    path.write_text(json.dumps(config | {"model_type": "bert", "is_decoder": True}))
    with pytest.raises(CheckpointError, match="is_decoder: is True"):
        read(tmp_path)


def test_groups_that_do_not_divide_the_layers_are_refused(tmp_path: Path) -> None:
    random_albert(num_hidden_groups=3).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"sharing\.groups: 3 groups do not divide 4"):
        read(tmp_path)
