"""What must not pass for a faithful copy: silent differences, lost weights, NaN, fewer layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from encoder_cases import ALL_MPO, encoder, made, scaled, trained
from hub_model import random_albert, random_gpt2, random_t5, read
from run_folders import ALBERT, SHARED, Workshop, prepare_markov

from mpotrain.cli import main
from mpotrain.convert import export as export_module
from mpotrain.convert.probe import difference
from mpotrain.errors import CheckpointError
from mpotrain.nn.sharing_config import StartConfig

CUT = [
    "model.sharing={scope='central'}",
    "model.sites.query={kind='mpo', in_modes=[4, 2, 4], out_modes=[4, 2, 4], cap=2}",
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Models of Hugging Face, and data."""
    root = tmp_path_factory.mktemp("shop")
    random_albert().save_pretrained(root / "albert")
    random_t5().save_pretrained(root / "t5")
    random_gpt2().save_pretrained(root / "gpt2")
    return Workshop(root, prepare_markov(root / "data"))


def changed(shop: Workshop, hub: str, folder: Path, **keys: Any) -> Path:
    """Copy a folder of Hugging Face with other keys in its configuration."""
    folder.mkdir()
    for path in (shop.root / hub).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("hub", "keys", "told"),
    [
        ("t5", {"dense_act_fn": "gelu_new"}, "dense_act_fn: is 'gelu_new'"),
        ("t5", {"is_gated_act": True}, "is_gated_act: is True"),
        ("t5", {"num_attention_heads": 2}, "num_attention_heads: is 2, but num_heads is"),
        ("gpt2", {"num_attention_heads": 8}, "num_attention_heads: is 8, but n_head is"),
        ("gpt2", {"hidden_size": 7}, "hidden_size: is 7, but n_embd is"),
        ("albert", {"hidden_act": ["gelu"]}, "hidden_act: is"),
        ("albert", {"layer_norm_eps": float("inf")}, "layer_norm_eps: is inf"),
    ],
)
def test_keys_by_which_transformers_computes_something_else(
    shop: Workshop, hub: str, keys: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(changed(shop, hub, tmp_path / "hub", **keys))
    assert told in str(caught.value)


def test_a_second_name_that_says_the_same_is_no_problem(shop: Workshop, tmp_path: Path) -> None:
    heads = json.loads((shop.root / "gpt2" / "config.json").read_text())["n_head"]
    read(changed(shop, "gpt2", tmp_path / "hub", num_attention_heads=heads))


def test_a_configuration_too_deep_to_read(shop: Workshop, tmp_path: Path) -> None:
    folder = changed(shop, "gpt2", tmp_path / "hub")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(folder)


def test_nan_is_the_largest_difference_wherever_it_stands() -> None:
    ones, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    for names in (("scores", "pairs"), ("pairs", "scores")):
        found = difference(dict.fromkeys(names, ones), {names[0]: ones, names[1]: nan})
        assert found != found


def test_overflowing_scores_are_refused(
    shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_albert()
    with torch.no_grad():
        model.sop_classifier.classifier.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "hub")
    for name, more in (("equal", []), ("deeper", ["model.num_layers=8"])):
        assert shop.convert(tmp_path / "hub", "encoder", name, *ALBERT, *SHARED, *more) == 2
        assert "scores are not finite" in capsys.readouterr().err
        assert not (shop.root / name).exists()


@pytest.mark.parametrize(
    "more",
    [
        ["model.num_layers=8"],
        ["model.start={auxiliary_scale='per_side'}"],
        ["model.num_layers=8", "model.start={unscaled_layers=4, deeper='drawn'}"],
    ],
)
def test_truncated_matrices_need_leave_where_scores_differ_anyway(
    shop: Workshop, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"cut-{abs(hash(tuple(more)))}"
    assert shop.convert(shop.root / "albert", "encoder", name, *ALBERT, *CUT, *more) == 2
    text = capsys.readouterr().err
    assert "bonds are truncated by more than" in text
    assert "blocks.0.attention.query" in text
    given = [*ALBERT, *CUT, *more, "--allow-truncation"]
    assert shop.convert(shop.root / "albert", "encoder", name, *given) == 0


def test_fewer_layers_are_refused(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*ALBERT, *SHARED, "model.num_layers=2"]
    assert shop.convert(shop.root / "albert", "encoder", "shallow", *settings) == 2
    assert "model.num_layers: is 2, the source has 4" in capsys.readouterr().err


def test_nothing_is_drawn_where_no_layer_is_deeper() -> None:
    start = StartConfig(unscaled_layers=4, deeper="drawn")
    filled, _, off = made(encoder("central", sites=ALL_MPO, start=start), trained(encoder("all")))
    assert (filled.is_exact, off < 1e-5) == (True, True)
    assert not any("drawn anew" in note for note in filled.notes)
    deeper = encoder("central", sites=ALL_MPO, start=scaled("per_side", 2))
    assert not made(deeper, trained(encoder("all")))[0].is_exact


def test_an_export_that_is_not_what_was_written_is_not_kept(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = shop.made(shop.root / "gpt2", "gpt2", "faithful")
    whole = export_module.hub_source

    def slightly_off(folder: Path, origin: str) -> Any:
        found = whole(folder, origin)
        bias = found.weights["final_norm.bias"]
        bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))  # too little for any score
        return found

    monkeypatch.setattr(export_module, "hub_source", slightly_off)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "final_norm.bias is not what was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_exported_tokenizer_opens_as_what_it_is(shop: Workshop, tmp_path: Path) -> None:
    """AutoTokenizer would else take GPT-2's own class, which reads other ids."""
    words = {f"w{n}": n for n in range(90)} | {"<|endoftext|>": 90}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{n % 90}" for n in range(3000)))
    arguments = ["prepare", str(text), "--tokenizer", str(tmp_path / "tokenizer.json"),
                 "--out", str(tmp_path / "data"), "--workers", "0"]  # fmt: skip
    assert main(arguments) == 0
    (tmp_path / "own").mkdir()
    own = Workshop(tmp_path / "own", tmp_path / "data")
    run = own.made(shop.root / "gpt2", "gpt2", "words", "data.split=[1.0, 0.0, 0.0]")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened("w3 w17 w88")["input_ids"] == [3, 17, 88]
