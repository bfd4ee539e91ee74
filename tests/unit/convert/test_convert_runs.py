"""`mpotrain convert` through the command line: a dense run becomes a mixture of experts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from hub_model import random_gpt2
from mixture_cases import MIXTURES, SWITCH
from run_process import write_run

from mpotrain.checkpoint.reader import CheckpointReader, open_checkpoint
from mpotrain.cli import main
from mpotrain.train.journal import read_metrics
from mpotrain.trained import load_trained

DENSE = 'model.sites.{}={{kind="dense"}}'
BASE = [
    *(DENSE.format(family) for family in ("c_fc", "c_proj")),
    "model.vocab_size=320",
    "model.context_length=32",
    "model.dropout=0.0",
    "data.sequence_length=32",
    "data.split=[0.9, 0.1, 0.0]",
    "train.steps=4",
    "train.eval_every=4",
    "train.schedule.warmup_steps=0",
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a dense GPT-2 trained on stories for a few steps."""
    root = tmp_path_factory.mktemp("dense")
    arguments = ["prepare", "--synthetic", "stories", "--documents", "300", "--vocab-size", "320",
                 "--out", str(root / "data"), "--workers", "0"]  # fmt: skip
    assert main(arguments) == 0
    run = write_run(root, root / "data")
    assert main(["train", str(run), *BASE]) == 0
    return root / "run"


def convert(dense: Path, folder: Path, *more: str, source: Path | None = None) -> int:
    """Convert a run into a new folder; options and overrides may follow."""
    run = dense.parent / "run.toml"
    return main(["convert", str(source or dense), str(run), *BASE, f'folder="{folder}"', *more])


def moe(mixture: str) -> list[str]:
    return ["--to", "mpo-moe", f"model.moe={{{mixture}}}"]


def loss(folder: Path, capsys: pytest.CaptureFixture[str], split: str = "validation") -> float:
    capsys.readouterr()
    assert main(["eval", str(folder), "--json", "--split", split]) == 0
    return float(json.loads(capsys.readouterr().out)["loss"])


def scores(folder: Path, step: int | None = None) -> torch.Tensor:
    model = load_trained(folder, step).model
    tokens = torch.arange(64).view(2, 32) * 5 % 320
    with torch.no_grad():
        return model.logits(model.hidden(tokens))


def weights(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    return {name: reader.read(name)["weight"] for name in reader.manifest.tensors}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=list(MIXTURES))
def test_a_mixture_of_copies_is_the_dense_model_and_trains(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mixture: str
) -> None:
    folder = tmp_path / "run"
    assert convert(dense, folder, *moe(mixture)) == 0
    told = capsys.readouterr().out
    assert "scores differ by" in told
    assert "truncation error" not in told
    assert told.count("exact, rounding") == (0 if "every=2" in mixture else 4)
    expected = scores(dense)
    torch.testing.assert_close(scores(folder), expected, rtol=0, atol=1e-5)
    assert loss(folder, capsys) == pytest.approx(loss(dense, capsys), abs=1e-5)

    overrides = [*BASE, f'folder="{folder}"', f"model.moe={{{mixture}}}"]
    assert main(["train", str(dense.parent / "run.toml"), *overrides]) == 0
    assert [record["step"] for record in read_metrics(folder, "train")] == [1, 2, 3, 4]
    assert loss(folder, capsys) < loss(dense, capsys)
    trained = weights(open_checkpoint(folder / "checkpoints" / "step-00000004"))
    start = weights(open_checkpoint(folder / "checkpoints" / "step-00000000"))
    assert [name for name in start if torch.equal(start[name], trained[name])] in ([], ONE_ROUTER)


ONE_ROUTER = [f"blocks.{layer}.ffn.router.weight" for layer in (0, 1)]
"""With one expert there is nothing to choose, so its router has no gradient."""


def test_training_begins_with_the_loss_of_the_dense_run(dense: Path, tmp_path: Path) -> None:
    """Step 1 is the same whatever the model was converted to."""
    first = []
    for name, choice in {
        "dense": ["--to", "gpt2"],
        "mixture": moe(MIXTURES["top-2, published shape"]),
    }.items():
        folder = tmp_path / name
        assert convert(dense, folder, *choice) == 0
        overrides = [*BASE, f'folder="{folder}"', *choice[2:]]
        assert main(["train", str(dense.parent / "run.toml"), *overrides]) == 0
        first.append(read_metrics(folder, "train")[0])
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], abs=1e-5)
    assert first[0]["consumed_samples"] == first[1]["consumed_samples"] == 8


def test_a_checkpoint_of_step_0_holds_weights_alone(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert convert(dense, folder, *moe(MIXTURES["balanced, no token dropped"])) == 0
    reader = open_checkpoint(folder / "checkpoints" / "step-00000000")
    assert {tuple(entry.kinds) for entry in reader.manifest.tensors.values()} == {("weight",)}
    position = reader.manifest.run
    assert (position.step, position.num_updates, position.consumed_samples) == (0, 0, 0)
    assert position.engine == {"kind": "convert", "source": f"{dense}, step 4"}
    roles = {name: entry.role for name, entry in reader.manifest.tensors.items()}
    assert roles["blocks.1.ffn.router.balance"] == "buffer"
    assert roles["blocks.0.ffn.c_fc.central"] == "central"
    assert roles["blocks.0.ffn.c_fc.auxiliaries.1"] == "auxiliary"
    assert roles["blocks.0.ffn.c_fc.bias"] == "expert"
    assert (folder / "tokenizer.model").is_file()


def test_experts_are_copies_and_the_rest_is_equal(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert convert(dense, folder, *moe(MIXTURES["top-2, published shape"])) == 0
    old, new = load_trained(dense, None), load_trained(folder, None)
    before, after = dict(old.model.named_parameters()), dict(new.model.named_parameters())
    for name, parameter in after.items():
        if "ffn" not in name:
            assert torch.equal(parameter, before[name]), name
        elif "auxiliaries" in name or name.endswith("c_fc.bias"):
            assert parameter.shape[0] == 4
            assert torch.equal(parameter, parameter[:1].expand_as(parameter)), name
    assert torch.equal(after["blocks.1.ffn.c_fc.bias"][3], before["blocks.1.ffn.c_fc.bias"])
    # The router is that of the seed: routing differs between experts from the first step on.
    router = after["blocks.0.ffn.router.weight"]
    assert float(router.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_conversion_repeats_itself_bit_for_bit(dense: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        assert convert(dense, tmp_path / name, *moe(MIXTURES["top-1"])) == 0
        found.append(open_checkpoint(tmp_path / name / "checkpoints" / "step-00000000"))
    one, two = map(weights, found)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_step_of_the_source_can_be_named(dense: Path, tmp_path: Path) -> None:
    longer = [*BASE, "train.steps=6", "checkpoint.every=2", f'folder="{tmp_path / "longer"}"']
    assert main(["train", str(dense.parent / "run.toml"), *longer]) == 0
    source = tmp_path / "longer"
    assert convert(dense, tmp_path / "run", "--to", "gpt2", "--step", "2", source=source) == 0
    assert torch.equal(scores(tmp_path / "run"), scores(source, 2))
    assert not torch.equal(scores(source, 2), scores(source))


def test_generate_writes_the_same_text(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert convert(dense, folder, *moe(MIXTURES["top-1"])) == 0
    capsys.readouterr()
    texts = []
    for path in (dense, folder):
        assert main(["generate", str(path), "--prompt", "Once", "--tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def refused(arguments: int, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert arguments == 2
    told = capsys.readouterr().err
    for word in words:
        assert word in told
    return told


TRUNCATED = f"num_experts=2, router={{{SWITCH}}}, " + (
    'c_fc={kind="mpo", in_modes=[4, 2, 4], out_modes=[4, 8, 4], cap=12}, '
    'c_proj={kind="asymmetric", in_mode=16, out_mode=8, in_bond=12}'
)


def test_truncation_must_be_allowed(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    refused(
        convert(dense, folder, *moe(TRUNCATED)), capsys,
        "error: command line", "--allow-truncation", "Nothing is written",
        "blocks.0.ffn.c_fc: bonds 12, 12; truncation error", "blocks.1.ffn.c_proj: bonds 12, 8",
    )  # fmt: skip
    assert not folder.exists()
    assert convert(dense, folder, *moe(TRUNCATED), "--allow-truncation") == 0
    assert capsys.readouterr().out.count("truncation error") == 4
    assert loss(folder, capsys) != pytest.approx(loss(dense, capsys), abs=1e-4)


def test_a_difference_without_truncation_is_never_let_through(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = [*moe(MIXTURES["top-1"]), "--tolerance", "0", "--allow-truncation"]
    refused(convert(dense, tmp_path / "run", *exact), capsys, "although no bond is truncated")
    assert not (tmp_path / "run").exists()


def test_all_reasons_against_a_conversion_are_given_at_once(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [
        "model.num_heads=8",
        "model.vocab_size=384",
        "model.context_length=64",
        'model.sites.qkv={kind="mpo", in_modes=[8, 4], out_modes=[8, 12], bias=false}',
    ]
    mixture = (
        "num_experts=4, router={eval_capacity_factor=2.0}, "
        'c_fc={kind="asymmetric", in_mode=8, out_mode=16, bias=false}'
    )
    refused(
        convert(dense, dense, *moe(mixture), *wrong), capsys,
        "8 problems",
        "has a checkpoint of step 4",
        "model.num_heads: is 8, the source has 4",
        "model.vocab_size: is 384, the source has 320; set model.vocab_size=320",
        "model.context_length: is 64, the source has 32",
        "model.sites.qkv.bias: is False",
        "model.moe.c_fc.bias: is False",
        'model.moe.router.gate: "probability" multiplies',
        "model.moe.router.eval_capacity_factor: is 2.0, which can drop tokens",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--to", "mpo-moe"], "model.moe: is absent"),
        (["--to", "gpt2", "model.moe={num_experts=2}"], "model.moe: --to gpt2 makes no experts"),
        (["--to", "encoder"], "model.kind: is gpt2, but --to encoder was asked for"),
        (moe("num_experts=4, router={top_k=2, normalise=false}"), "router.normalise: is false"),
        (["--to", "gpt2", "--tolerance", "nan"], "--tolerance nan"),
        (["--to", "gpt2", "--step", "77"], "no checkpoint of step 77"),
    ],
)
def test_requests_that_cannot_be_met(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], word: str
) -> None:
    refused(convert(dense, tmp_path / "run", *more), capsys, word)
    assert not (tmp_path / "run").exists()


def test_only_the_first_of_several_ranks_converts(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert convert(dense, tmp_path / "run", "--to", "gpt2") == 0
    assert not (tmp_path / "run").exists()


def test_mixtures_are_no_source(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = tmp_path / "mixture"
    assert convert(dense, mixture, *moe(MIXTURES["top-1"])) == 0
    again = convert(dense, tmp_path / "run", *moe(MIXTURES["top-1"]), source=mixture)
    refused(again, capsys, "has mixtures of experts")
    again = convert(dense, tmp_path / "run", "--to", "gpt2", source=tmp_path / "nothing")
    refused(again, capsys, "holds no checkpoint; name a run folder")


def test_tensorized_layers_become_dense_ones_and_experts(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ttm = [*BASE[2:], "train.steps=1", f'folder="{tmp_path / "ttm"}"']
    assert main(["train", str(dense.parent / "run.toml"), *ttm]) == 0
    expected = scores(tmp_path / "ttm")
    for name, choice in {"dense": ["--to", "gpt2"], "mixture": moe(MIXTURES["top-1"])}.items():
        assert convert(dense, tmp_path / name, *choice, source=tmp_path / "ttm") == 0
        torch.testing.assert_close(scores(tmp_path / name), expected, rtol=0, atol=1e-5)
    capsys.readouterr()
    back = ["--to", "gpt2", 'model.sites.c_fc={kind="mpo", in_modes=[8, 4], out_modes=[16, 8]}']
    assert convert(dense, tmp_path / "back", *back, source=tmp_path / "dense") == 0
    assert capsys.readouterr().out.count("bonds 32; exact, rounding") == 2
    torch.testing.assert_close(scores(tmp_path / "back"), expected, rtol=0, atol=1e-5)


def test_a_run_that_has_begun_and_other_tokenizers_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    refused(convert(dense, folder, "--to", "gpt2"), capsys, "holds a run that has begun")
    other = tmp_path / "other"
    arguments = ["prepare", "--synthetic", "stories", "--documents", "300", "--vocab-size", "320",
                 "--model-type", "bpe", "--out", str(other), "--workers", "0"]  # fmt: skip
    assert main(arguments) == 0
    source = f'data.sources=[{{path="{other}"}}]'
    told = convert(dense, tmp_path / "new", "--to", "gpt2", source)
    refused(told, capsys, "its weights know other tokens")


def hub_run(folder: Path, data: Path, to: Sequence[str]) -> list[str]:
    return [
        *BASE, "model.vocab_size=96", "model.context_length=24", "data.sequence_length=24",
        "model.num_layers=3", f'folder="{folder}"', f'data.sources=[{{path="{data}"}}]', *to,
    ]  # fmt: skip


def test_a_model_of_the_hub_is_evaluated_upcycled_and_trained(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, data, run = tmp_path / "hub", tmp_path / "data", str(dense.parent / "run.toml")
    random_gpt2().save_pretrained(hub)
    assert main(["prepare", "--synthetic", "markov", "--tokens", "20000", "--out", str(data)]) == 0
    losses = []
    for name, to in {"plain": ["--to", "gpt2"], "moe": moe(MIXTURES["top-1"])}.items():
        overrides = hub_run(tmp_path / name, data, to)
        assert main(["convert", str(hub), run, *overrides]) == 0
        losses.append(loss(tmp_path / name, capsys, "train"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    model = random_gpt2()
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        expected = model(tokens).logits
        ours = load_trained(tmp_path / "moe", None).model
        torch.testing.assert_close(
            ours.logits(ours.hidden(tokens)), expected, rtol=0, atol=2e-5 * float(expected.max())
        )
    overrides = hub_run(tmp_path / "moe", data, moe(MIXTURES["top-1"])[2:])
    assert main(["train", run, *overrides]) == 0
    assert read_metrics(tmp_path / "moe", "train")[-1]["step"] == 4
    overrides = hub_run(tmp_path / "third", data, ["--to", "gpt2", "--step", "3"])
    refused(main(["convert", str(hub), run, *overrides]), capsys, "has no steps")


def test_the_vocabulary_of_the_hub_model_must_be_that_of_the_data(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, data, text = tmp_path / "hub", tmp_path / "data", tmp_path / "text.txt"
    text.write_text("".join(f"story {n} has {n * n} words and ends here\n" for n in range(300)))
    size = write_tokenizer(hub, text)
    random_gpt2(vocab_size=size, n_positions=32, n_layer=2).save_pretrained(hub)
    arguments = ["prepare", str(text), "--per-line", "--tokenizer", str(hub / "tokenizer.json"),
                 "--out", str(data), "--workers", "0"]  # fmt: skip
    assert main(arguments) == 0
    fit = ["--to", "gpt2", f"model.vocab_size={size}", f'data.sources=[{{path="{data}"}}]']
    assert convert(dense, tmp_path / "one", *fit, source=hub) == 0
    # The same vocabulary in the older form goes as well; any exchange of two ids does not.
    content = json.loads((hub / "tokenizer.json").read_text())
    ids = content["model"]["vocab"] | {"<|endoftext|>": 0}
    (hub / "tokenizer.json").unlink()
    (hub / "vocab.json").write_text(json.dumps(ids))
    assert convert(dense, tmp_path / "two", *fit, source=hub) == 0
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (hub / "vocab.json").write_text(json.dumps(ids))
    told = convert(dense, tmp_path / "three", *fit, source=hub)
    refused(told, capsys, "has another vocabulary than", str(hub / "vocab.json"), str(data))
    sentencepiece = ["--to", "gpt2", f"model.vocab_size={size}"]
    told = convert(dense, tmp_path / "three", *sentencepiece, source=hub)
    refused(told, capsys, "has another vocabulary than")


def write_tokenizer(folder: Path, text: Path) -> int:
    """Train a byte-level BPE like GPT-2's and return the size of its vocabulary."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train([str(text)], trainer)
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    return int(model.get_vocab_size())
