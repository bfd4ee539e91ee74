"""One small run on text, and everything one does with it afterwards, through the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_process import write_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mpotrain.cli import main
from mpotrain.data.stories import check_story
from mpotrain.generate import Sampling, generate
from mpotrain.train.journal import read_metrics
from mpotrain.trained import held_out_text, load_trained, run_tokenizer

OVERRIDES = [
    "model.vocab_size=320",
    "model.context_length=64",
    "data.sequence_length=64",
    "data.split=[0.8, 0.1, 0.1]",
    "train.steps=8",
    "train.eval_every=8",
    "train.eval_sequences=100000",
    "train.spectra_every=4",
    "train.tensorboard=true",
    "train.schedule.warmup_steps=0",
]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a tiny TTM GPT-2 trained on stories, with a trace of its steps."""
    root = tmp_path_factory.mktemp("text")
    arguments = ["prepare", "--synthetic", "stories", "--documents", "300", "--vocab-size", "320",
                 "--out", str(root / "data"), "--workers", "0"]  # fmt: skip
    assert main(arguments) == 0
    run = write_run(root, root / "data")
    assert main(["train", str(run), *OVERRIDES, "--profile"]) == 0
    return root / "run"


def test_eval_repeats_the_last_evaluation_of_the_run(
    text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = read_metrics(text_run, "eval")[-1]
    assert main(["eval", str(text_run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for key in ("loss", "perplexity", "bits_per_byte", "num_tokens", "num_sequences"):
        assert result[key] == recorded[key], key
    assert result["bits_per_byte"] > 0
    # Over the whole split bits per byte are exact: nats over the bytes of the very same text.
    assert main(["eval", str(text_run), "--split", "test"]) == 0
    assert "test: loss" in capsys.readouterr().out


def test_bits_per_byte_of_the_whole_split_are_those_of_its_text(text_run: Path) -> None:
    recorded = read_metrics(text_run, "eval")[-1]
    text = held_out_text(text_run)
    nats = recorded["loss"] * recorded["num_tokens"]
    # The windows leave out the first token and a remainder shorter than one of them.
    assert nats / 0.6931471805599453 / len(text) == pytest.approx(
        recorded["bits_per_byte"], rel=0.02
    )


def test_eval_with_another_tokenizer_is_refused(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    arguments = ["prepare", "--synthetic", "stories", "--documents", "300", "--vocab-size", "320",
                 "--model-type", "bpe", "--out", str(other), "--workers", "0"]  # fmt: skip
    assert main(arguments) == 0
    source = f'data.sources=[{{path="{other}"}}]'
    assert main(["eval", str(text_run), source]) == 2
    assert "is not the one that" in capsys.readouterr().err


def test_generate_needs_only_the_run_folder_and_repeats_itself(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "moved"
    shutil.copytree(text_run, alone)
    (text_run.parent / "data").rename(text_run.parent / "hidden")
    try:
        arguments = ["generate", str(alone), "--prompt", "Once", "--tokens", "20", "--samples", "2"]
        assert main(arguments) == 0
        first = capsys.readouterr().out
        assert main(arguments) == 0
        assert capsys.readouterr().out == first
        assert first.count("Once") == 2
        assert main([*arguments, "--seed", "5"]) == 0
        assert capsys.readouterr().out != first
        assert main(["generate", str(alone), "--tokens", "5", "--check-stories"]) == 0
        assert "of 1 texts accepted by the checker" in capsys.readouterr().out
    finally:
        (text_run.parent / "hidden").rename(text_run.parent / "data")


def test_a_changed_tokenizer_file_is_not_used(text_run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "moved"
    shutil.copytree(text_run, alone)
    tokenizer = alone / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-3] + b"xyz")
    # The data still have the right one, and the run folder's is passed over.
    assert run_tokenizer(load_trained(alone, None)).vocab_size == 320


def test_greedy_text_is_the_argmax_of_full_forwards(text_run: Path) -> None:
    trained = load_trained(text_run, None)
    tokenizer = run_tokenizer(trained)
    start = tokenizer.encode("Once upon")
    new = generate(
        trained.model, start, Sampling(max_new_tokens=12, temperature=0.0),
        context_length=64, vocab_size=320,
    )  # fmt: skip
    tokens = list(start)
    with torch.no_grad():
        for expected in new:
            hidden = trained.model.hidden(torch.tensor([tokens]))
            assert int(trained.model.logits(hidden)[0, -1].argmax()) == expected
            tokens.append(expected)


class FixedScores(torch.nn.Module):
    """A model whose scores never change."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(torch.tensor(probabilities).log())

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[..., None].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scores.expand(*hidden.shape[:-1], -1)


def draws(sampling: Sampling, stop: int | None = None) -> list[int]:
    model = FixedScores([0.5, 0.3, 0.15, 0.05])
    return generate(model, [0], sampling, context_length=4, vocab_size=4, stop_token=stop)


def test_sampling_follows_the_distribution_and_its_cuts() -> None:
    many = draws(Sampling(max_new_tokens=4000, temperature=1.0))
    assert [many.count(t) / 4000 for t in range(4)] == pytest.approx(
        [0.5, 0.3, 0.15, 0.05], abs=0.03
    )
    assert set(draws(Sampling(max_new_tokens=300, temperature=1.0, top_k=2))) == {0, 1}
    assert set(draws(Sampling(max_new_tokens=300, temperature=1.0, top_p=0.79))) == {0, 1}
    assert set(draws(Sampling(max_new_tokens=300, temperature=1.0, top_p=0.81))) == {0, 1, 2}
    assert set(draws(Sampling(max_new_tokens=300, temperature=1.0, top_p=1e-9))) == {0}
    assert set(draws(Sampling(max_new_tokens=300, temperature=0.01))) == {0}


def test_the_stop_token_ends_the_text() -> None:
    stopped = draws(Sampling(max_new_tokens=100_000, temperature=1.0), stop=3)
    assert 3 not in stopped
    assert len(stopped) < 1000


@pytest.mark.parametrize(
    "bad",
    [["--top-p", "0"], ["--top-k", "0"], ["--tokens", "-1"], ["--samples", "0"],
     ["--temperature", "-1"], ["--seed", "-1"]],
)  # fmt: skip
def test_impossible_sampling_is_refused(
    bad: list[str], text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(text_run), *bad]) == 2
    assert bad[0] in capsys.readouterr().err


def test_inspect_shows_what_plan_foretold(
    text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(text_run / "config.toml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(text_run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["num_parameters"] == plan["num_parameters"]
    assert shown["num_parameters_if_dense"] == plan["dense_num_parameters"]
    sites = {site["family"]: site for site in plan["sites"]}
    assert len(shown["sites"]) == 4
    for row in shown["sites"]:
        site = sites[row["name"].split(".")[-1]]
        assert row["bonds"] == site["bonds"]
        assert row["modes"] == site["modes"]
        assert row["parameters"] * site["copies"] == site["parameters"]
        assert all(0 <= value <= 1 for value in row["normalised"])
    assert main(["inspect", str(text_run)]) == 0
    assert "blocks.0.ffn.c_fc" in capsys.readouterr().out
    assert main(["inspect", str(text_run.parent / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 320


def test_spectra_trace_and_tensorboard_are_written(text_run: Path) -> None:
    spectra = read_metrics(text_run, "spectra")
    assert [record["step"] for record in spectra] == [4, 8]
    assert set(spectra[0]) >= {"core_norm", "bond_entropy", "weight_norm"}
    assert "blocks.1.ffn.c_proj.bond.2" in spectra[0]["bond_entropy"]
    assert list((text_run / "profile").glob("*.json.gz"))
    events = EventAccumulator(str(text_run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert "train/grad_norm_by_role/central" in events.Tags()["scalars"]
    assert "spectra/core_norm/blocks.0.ffn.c_fc.cores.0" in events.Tags()["scalars"]


def test_the_run_folder_holds_what_reproduces_it(
    text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(text_run / "config.toml")]) == 0
    assert capsys.readouterr().out == (text_run / "config.toml").read_text()
    start = json.loads((text_run / "environment.jsonl").read_text().splitlines()[0])
    assert set(start) == {"time", "step", "world_size", "device", "host", "versions", "git"}
    assert json.loads((text_run / "outcome.json").read_text())["outcome"] == "done"


def test_no_text_of_an_untrained_model_is_a_story() -> None:
    assert not check_story("Once upon a time")
