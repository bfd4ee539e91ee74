"""`mpotrain export`: transformers computes what ours does, and weights come back bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hub_model import (
    ours,
    random_albert,
    random_bert,
    random_gpt2,
    random_t5,
    read,
    theirs,
)
from run_folders import ADAPTER, ALBERT, CENTRAL, MPO, SHARED, Workshop, prepare_markov

from mpotrain.cli import main
from mpotrain.convert import export as export_module
from mpotrain.convert.source import run_source

GPT2_MPO = ["model.sites.c_fc={kind='mpo', in_modes=[4, 2, 4], out_modes=[4, 8, 4]}"]
T5_MPO = ["model.sites.c_fc={kind='mpo', in_modes=[4, 2, 4], out_modes=[4, 2, 7]}"]
NO_PAIRS = ["model.pair_head=false", "data.objective.pairs=false"]
GELU = ["model.activation='gelu'"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Hugging Face folders of every kind, and data."""
    root = tmp_path_factory.mktemp("shop")
    random_gpt2().save_pretrained(root / "hub-gpt2")
    random_albert().save_pretrained(root / "hub-albert")
    random_bert().save_pretrained(root / "hub-bert")
    random_t5().save_pretrained(root / "hub-t5")
    return Workshop(root, prepare_markov(root / "data"))


CASES = {
    "gpt2": ("gpt2", "gpt2", [], "GPT2LMHeadModel"),
    "gpt2, tensorized": ("gpt2", "gpt2", GPT2_MPO, "GPT2LMHeadModel"),
    "albert": ("albert", "encoder", [*ALBERT, *SHARED], "AlbertForPreTraining"),
    "albert, shared cores": ("albert", "encoder", [*ALBERT, *SHARED, *MPO], "AlbertForPreTraining"),
    "depth-shared": ("albert", "encoder", [*ALBERT, *CENTRAL], "AlbertForPreTraining"),
    "with adapters": ("albert", "encoder", [*ALBERT, *CENTRAL, *ADAPTER], "AlbertForPreTraining"),
    "without the pair head": (
        "albert", "encoder", [*ALBERT, *SHARED, *NO_PAIRS], "AlbertForMaskedLM",
    ),
    "bert": ("bert", "encoder", GELU, "BertForPreTraining"),
    "bert, tensorized": ("bert", "encoder", [*GELU, *MPO], "BertForPreTraining"),
    "bert, masked tokens alone": (
        "bert", "encoder", [*GELU, *NO_PAIRS], "BertForMaskedLM",
    ),
    "t5": ("t5", "t5", [], "T5ForConditionalGeneration"),
    "t5, tensorized": ("t5", "t5", T5_MPO, "T5ForConditionalGeneration"),
}  # fmt: skip


@pytest.mark.parametrize(("hub", "kind", "settings", "architecture"), CASES.values(), ids=CASES)
def test_transformers_computes_what_ours_does(
    shop: Workshop,
    tmp_path: Path,
    hub: str,
    kind: str,
    settings: list[str],
    architecture: str,
) -> None:
    run = shop.made(shop.root / f"hub-{hub}", kind, f"run-{tmp_path.name}", *settings)
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    model, told = getattr(transformers, architecture).from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    source, back = run_source(run, None), read(out)
    expected, found = ours(source), theirs(model.eval(), source.config)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    if any("sites" in line for line in settings):
        return
    first = read(shop.root / f"hub-{hub}")
    assert all(torch.equal(first.weights[name], tensor) for name, tensor in back.weights.items())
    assert back.config == first.config
    left_out = {name.partition(".")[0] for name in first.weights.keys() - back.weights.keys()}
    assert left_out <= {"pooler", "pair_head"}
    assert bool(left_out) == ("MaskedLM" in architecture)


def test_ids_with_a_meaning_come_from_the_objective(shop: Workshop, tmp_path: Path) -> None:
    wanted = {
        "encoder": {"bos_token_id": 94, "eos_token_id": 93, "pad_token_id": 0, "mask_token_id": 95},
        "t5": {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0},
        "gpt2": {"bos_token_id": None, "eos_token_id": None},
    }
    hubs = {"encoder": ("albert", [*ALBERT, *SHARED]), "t5": ("t5", []), "gpt2": ("gpt2", [])}
    for kind, (hub, settings) in hubs.items():
        run = shop.made(shop.root / f"hub-{hub}", kind, f"ids-{kind}", *settings)
        assert main(["export", str(run), str(tmp_path / kind)]) == 0
        found = json.loads((tmp_path / kind / "config.json").read_text())
        assert found.items() >= wanted[kind].items()
        config = transformers.AutoConfig.from_pretrained(tmp_path / kind)
        assert all(getattr(config, key) == value for key, value in wanted[kind].items())
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    assert (
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape[0] == 1
    )


def test_a_trained_step_can_be_named(shop: Workshop, tmp_path: Path) -> None:
    settings = [*ALBERT, *CENTRAL, *ADAPTER]
    run = shop.made(shop.root / "hub-albert", "encoder", "trained", *settings)
    assert shop.train("encoder", "trained", *settings) == 0
    for step in ("0", "3"):
        assert main(["export", str(run), str(tmp_path / step), "--step", step]) == 0
        source = run_source(run, int(step))
        model = transformers.AlbertForPreTraining.from_pretrained(tmp_path / step)
        expected, found = ours(source), theirs(model.eval(), source.config)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert not torch.equal(
        read(tmp_path / "0").weights["blocks.2.ffn.c_proj.weight"],
        read(tmp_path / "3").weights["blocks.2.ffn.c_proj.weight"],
    )


def test_the_tokenizer_goes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", "--synthetic", "stories", "--documents", "300", "--vocab-size", "320",
                 "--out", str(tmp_path / "data"), "--workers", "0"]  # fmt: skip
    assert main(arguments) == 0
    shop = Workshop(tmp_path, tmp_path / "data")
    random_gpt2(vocab_size=320).save_pretrained(tmp_path / "hub")
    run = shop.made(tmp_path / "hub", "gpt2", "run", "model.vocab_size=320")
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "config.json, model.safetensors, tokenizer.model" in capsys.readouterr().out
    given = (tmp_path / "data" / "tokenizer.model").read_bytes()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == given
    ids = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ids["eos_token_id"] == ids["bos_token_id"] != None  # noqa: E711
    # The exported folder is a source for the same data again, and its vocabulary is compared.
    assert shop.convert(tmp_path / "out", "gpt2", "again", "model.vocab_size=320") == 0
    # A second file with reserved ids of its own does not matter: like is compared with like.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.save(str(tmp_path / "out" / "tokenizer.json"))
    assert shop.convert(tmp_path / "out", "gpt2", "both", "model.vocab_size=320") == 0
    other = tmp_path / "other"
    assert main([*arguments[:-3], str(other), *arguments[-2:], "--model-type", "bpe"]) == 0
    moved = ["model.vocab_size=320", f'data.sources=[{{path="{other}"}}]']
    assert shop.convert(tmp_path / "out", "gpt2", "third", *moved) == 2
    assert "has another vocabulary than" in capsys.readouterr().err


def refused(code: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert code == 2
    told = capsys.readouterr().err
    for word in words:
        assert word in told


def test_models_that_hugging_face_has_not_are_refused(
    shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = ["model.moe={num_experts=2, router={gate='straight_through'}}"]
    run = shop.made(shop.root / "hub-t5", "t5", "mixture", *mixture, to="mpo-moe")
    refused(main(["export", str(run), str(tmp_path / "out")]), capsys, "has mixtures of experts")
    strange = ["model.norm='pre'", "model.hidden_size=32"]
    assert shop.train("encoder", "strange", *strange, "train.steps=1") == 0
    told = main(["export", str(shop.root / "strange"), str(tmp_path / "out")])
    refused(told, capsys, 'model.norm is "pre"')
    deep = ["model.start.deepnorm=true", "train.steps=1"]
    assert shop.train("encoder", "deepnorm", *deep) == 0
    told = main(["export", str(shop.root / "deepnorm"), str(tmp_path / "out")])
    refused(told, capsys, "model.start.deepnorm multiplies every residual")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_whole_or_absent(
    shop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = shop.made(shop.root / "hub-t5", "t5", "whole")
    (tmp_path / "there").mkdir()
    refused(main(["export", str(run), str(tmp_path / "there")]), capsys, "OUT", "exists")
    (tmp_path / "there").rmdir()

    def broken(name: str) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise OSError(28, "No space left on device")

        assert callable(getattr(export_module, name))
        return fail

    for name in ("fsync_folder", "publish"):
        with monkeypatch.context() as patched:
            patched.setattr(export_module, name, broken(name))
            with pytest.raises(Exception, match="No space left"):
                export_module.export(run, None, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    # A folder that would compute something else is not kept either.
    with monkeypatch.context() as patched:
        patched.setattr(export_module, "difference", lambda *_: 1e-3)
        refused(main(["export", str(run), str(tmp_path / "out")]), capsys, "nothing is written")
        loose = ["export", str(run), str(tmp_path / "loose"), "--tolerance", "0.1"]
        assert main(loose) == 0
    shutil.rmtree(tmp_path / "loose")
    assert list(tmp_path.iterdir()) == []
    told = main(["export", str(run), str(tmp_path / "out"), "--tolerance", "nan"])
    refused(told, capsys, "--tolerance nan")
    assert main(["export", str(run), str(tmp_path / "deep" / "out")]) == 0
    files = {path.name: path.stat().st_mode for path in (tmp_path / "deep" / "out").iterdir()}
    assert set(files) == {"config.json", "model.safetensors"}
    assert len(set(files.values())) == 1


def test_only_the_first_of_several_ranks_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 0
    assert list(tmp_path.iterdir()) == []
