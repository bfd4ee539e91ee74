"""`mpotrain convert` of encoders and T5 through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from hub_model import TOKENS, ours, random_albert, random_t5, read
from run_folders import ADAPTER, ALBERT, CENTRAL, MPO, SHARED, Workshop, prepare_markov

from mpotrain.assemble import build_model
from mpotrain.checkpoint.reader import open_checkpoint
from mpotrain.convert.probe import difference, probe_batch, source_outputs
from mpotrain.convert.source import Source, run_source
from mpotrain.convert.vocabulary import tokenizer_files, vocabulary
from mpotrain.errors import CheckpointError
from mpotrain.train.journal import read_metrics

MOE = "model.moe={num_experts=3, router={gate='straight_through'}, c_fc={kind='mpo', in_modes=[4, 2, 4], out_modes=[4, 2, 7]}}"  # noqa: E501


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """An ALBERT and a T5 of Hugging Face, and data."""
    root = tmp_path_factory.mktemp("shop")
    random_albert().save_pretrained(root / "albert")
    random_t5().save_pretrained(root / "t5")
    return Workshop(root, prepare_markov(root / "data"))


def distance(one: Source, other: Source) -> float:
    batch = probe_batch(one.config, TOKENS)
    return difference(source_outputs(one, batch), source_outputs(other, batch))


def test_albert_becomes_depth_shared_trains_and_is_folded(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*ALBERT, *CENTRAL, *ADAPTER]
    run = shop.made(shop.root / "albert", "encoder", "deep", *settings)
    told = capsys.readouterr().out
    assert told.count("exact, rounding") == 2
    assert "not in the source, drawn anew: adapters" in told
    assert distance(read(shop.root / "albert"), run_source(run, None)) < 1e-5
    manifest = open_checkpoint(run / "checkpoints" / "step-00000000").manifest
    roles = {name: entry.role for name, entry in manifest.tensors.items()}
    assert roles["bank.query.0"] == "central"
    assert roles["blocks.3.ffn.c_fc.auxiliaries.1"] == "auxiliary"
    assert roles["adapters.2.query.u"] == "adapter"

    assert shop.train("encoder", "deep", *settings) == 0
    assert [record["step"] for record in read_metrics(run, "train")] == [1, 2, 3]
    trained = run_source(run, None)
    assert float(trained.weights["adapters.1.query.u"].abs().max()) > 0
    capsys.readouterr()
    folded = shop.made(run, "encoder", "folded", *ALBERT)
    assert "adapters of the source added to its matrices" in capsys.readouterr().out
    assert distance(trained, run_source(folded, None)) < 1e-5
    plain = run_source(folded, None)
    assert not [name for name in plain.weights if "adapters" in name or "auxiliaries" in name]


def test_a_deeper_model_is_told_to_differ(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    deeper = ["model.num_layers=8", "model.start={auxiliary_scale='per_side', unscaled_layers=4}"]
    settings = [*ALBERT, *CENTRAL, *deeper]
    run = shop.made(shop.root / "albert", "encoder", "deeper", *settings)
    told = capsys.readouterr().out
    assert "8 layers made of 4" in told
    assert "auxiliary tensors of layers from 4 on scaled per_side for 8 layers" in told
    assert distance(read(shop.root / "albert"), run_source(run, None)) > 1e-3
    assert shop.train("encoder", "deeper", *settings) == 0


def test_missing_heads_are_drawn_from_the_seed_of_the_run(
    shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_albert(transformers.AlbertModel).save_pretrained(tmp_path / "bare")
    for seed in (1, 2):
        settings = [*ALBERT, *SHARED, f"train.seed={seed}"]
        run = shop.made(tmp_path / "bare", "encoder", f"bare-{seed}", *settings)
        assert "not in the source, drawn anew: mlm_head, pair_head" in capsys.readouterr().out
        written, bare = run_source(run, None), read(tmp_path / "bare")
        drawn = build_model(written.config, seed=seed, dtype="fp32").state_dict()
        for name, tensor in written.weights.items():
            expected = drawn if name.startswith(("mlm_head.", "pair_head.")) else bare.weights
            assert torch.equal(tensor, expected[name]), name


def test_t5_becomes_a_mixture_and_trains(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shop.made(shop.root / "t5", "t5", "mixture", MOE, to="mpo-moe")
    assert capsys.readouterr().out.count("exact, rounding") == 5
    assert distance(read(shop.root / "t5"), run_source(run, None)) < 1e-5
    assert shop.train("t5", "mixture", MOE) == 0
    assert len(read_metrics(run, "train")) == 3


def test_a_tensorized_t5_becomes_dense_again(shop: Workshop) -> None:
    site = "model.sites.c_fc={kind='mpo', in_modes=[4, 2, 4], out_modes=[4, 2, 7]}"
    tensorized = shop.made(shop.root / "t5", "t5", "tensorized", site)
    dense = shop.made(tensorized, "t5", "dense")
    first, last = read(shop.root / "t5"), run_source(dense, None)
    assert distance(first, last) < 1e-5
    for name, tensor in first.weights.items():
        assert torch.equal(last.weights[name], tensor) != ("c_fc" in name), name


def test_all_reasons_against_a_conversion_are_given_at_once(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["model.activation='relu'", "model.norm_eps=1e-5", "model.ffn_size=64",
             "model.vocab_size=128", "model.start.deepnorm=true"]  # fmt: skip
    assert shop.convert(shop.root / "albert", "encoder", "no", *wrong, to="t5") == 2
    told = capsys.readouterr().err
    for line in (
        "7 problems",
        "model.kind: is encoder, but --to t5 was asked for",
        "model.vocab_size: is 128, the source has 96; set model.vocab_size=96",
        "model.ffn_size: is 64, the source has 48",
        "model.embedding_size: is None, the source has 16; set model.embedding_size=16",
        "model.norm_eps: is 1e-05, the source has 1e-12",
        "model.activation: is relu, the source has gelu_tanh",
        "model.start.deepnorm: is true, the source has false",
    ):
        assert line in told
    assert shop.convert(shop.root / "t5", "encoder", "no") == 2
    assert "SOURCE: " in (told := capsys.readouterr().err)
    assert "is of the kind t5; it cannot become one of model.kind=encoder" in told
    assert shop.convert(shop.root / "t5", "t5", "no", "model.num_decoder_layers=3") == 2
    assert "num_decoder_layers: is 3, the source has 2" in capsys.readouterr().err
    assert shop.convert(shop.root / "albert", "encoder", "no", *ALBERT, to="mpo-moe") == 2
    assert "model.kind: is encoder, which has no mixtures" in capsys.readouterr().err
    # Own layers share no central tensor: the words of `encoder_problems` come through as well.
    untied = shop.made(shop.root / "albert", "encoder", "untied", *ALBERT)
    assert shop.convert(untied, "encoder", "no", *ALBERT, *CENTRAL) == 2
    assert 'model.sharing.vectors: is "tied"' in capsys.readouterr().err
    # Token numbers have no end of text that could tell documents apart.
    masked = [*ALBERT, *SHARED, "data.objective.document_mask=true"]
    assert shop.convert(shop.root / "albert", "encoder", "no", *masked) == 2
    assert "data.objective.document_mask: the tokenizer has no" in capsys.readouterr().err
    assert not (shop.root / "no").exists()


def test_truncation_must_be_allowed(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    small = [*ALBERT, *CENTRAL, f"{MPO[1][:-1]}, cap=6}}"]
    assert shop.convert(shop.root / "albert", "encoder", "small", *small) == 2
    assert "blocks.0.ffn.c_fc: bonds 6, 6; truncation error" in capsys.readouterr().err
    assert not (shop.root / "small").exists()
    shop.made(shop.root / "albert", "encoder", "small", *small, "--allow-truncation")


def test_vocabularies_of_all_files_are_read(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"story {n} ends\n" for n in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=40, minloglevel=2
    )
    pieces = vocabulary(tmp_path / "spiece.model")
    assert (len(pieces), pieces["<unk>"]) == (40, 0)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nword\n##s\n")
    assert vocabulary(tmp_path / "vocab.txt") == {"[PAD]": 0, "[UNK]": 1, "word": 2, "##s": 3}
    assert [path.name for path in tokenizer_files(tmp_path)] == ["spiece.model", "vocab.txt"]
    (tmp_path / "spiece.model").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is no vocabulary"):
        vocabulary(tmp_path / "spiece.model")


def test_outputs_of_two_models_are_compared_by_their_largest_difference(shop: Workshop) -> None:
    """The probe sees scores and pairs: a change of either alone is found."""
    source = read(shop.root / "albert")
    expected = ours(source)
    assert expected.keys() == {"scores", "pairs"}
    for name, untouched in {"pair_head.bias": "scores", "mlm_head.bias": "pairs"}.items():
        moved = {**source.weights, name: source.weights[name] + torch.tensor(0.5)}
        found = ours(Source("", source.config, moved))
        assert torch.equal(found[untouched], expected[untouched])
        assert difference(expected, found) > 0.1
