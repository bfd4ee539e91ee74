"""From a pretrained encoder to a classifier, through the command line, and taken up again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_process import curve, prepare_markov, state, write_run
from unit.tune.tuning import prepare_stories, write_pretraining, write_tuning

from mpotrain.checkpoint.manifest_file import MANIFEST_NAME, encode_manifest
from mpotrain.cli import main
from mpotrain.train.journal import read_metrics
from mpotrain.tune.foundation import newest_manifest

STEPS = 60
LEARN = [f"train.steps={STEPS}", "checkpoint.every=30"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a tiny depth-shared encoder after a few steps of pretraining."""
    root = tmp_path_factory.mktemp("encoder")
    assert main(["train", str(write_pretraining(root, prepare_stories(root / "data")))]) == 0
    return root / "encoder"


@pytest.fixture(scope="module")
def tuned(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the file of a finished fine-tuning run."""
    folder = tmp_path_factory.mktemp("tuned")
    run = write_tuning(folder, encoder)
    assert main(["tune", str(run), "--method", "full", *LEARN]) == 0
    return folder


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_it_learns_a_task_that_can_be_learnt(tuned: Path) -> None:
    found = results(tuned / "run")
    assert found["task"] == "sst2"
    assert (found["step"], found["num_examples"], found["num_training_examples"]) == (60, 37, 90)
    assert found["accuracy"] > 0.85
    evaluations = read_metrics(tuned / "run", "eval")
    assert [line["step"] for line in evaluations] == [STEPS]
    assert {k: evaluations[0][k] for k in ("loss", "accuracy", "num_examples")} == {
        k: found[k] for k in ("loss", "accuracy", "num_examples")
    }
    losses = [record["loss"] for record in read_metrics(tuned / "run", "train")]
    assert losses[0] == pytest.approx(0.69, abs=0.15)
    assert losses[-1] < losses[0] / 2
    assert json.loads((tuned / "run" / "outcome.json").read_text())["outcome"] == "done"


def test_step_zero_has_the_weights_of_the_source(encoder: Path, tmp_path: Path) -> None:
    run = write_tuning(tmp_path, encoder)
    # A learning rate that moves nothing: fp32 weights lose it in rounding.
    still = ["train.schedule.lr=1e-30", "train.steps=1", "train.optimizer.weight_decay=0.0"]
    assert main(["tune", str(run), *still]) == 0
    before, after = state(encoder, 4), state(tmp_path / "run", 1)
    heads = {name for name in before if name.startswith(("mlm_head", "pair_head"))}
    assert after.keys() - before.keys() == {"classifier.weight", "classifier.bias"}
    assert before.keys() - after.keys() == heads
    for name in before.keys() - heads:
        assert torch.equal(before[name]["weight"], after[name]["weight"]), name


def test_a_resume_is_bitwise_and_needs_no_source(
    encoder: Path, tuned: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(encoder, source)
    run = write_tuning(tmp_path, source)
    assert main(["tune", str(run), *LEARN, "train.stop_after=17"]) == 0
    assert not (tmp_path / "run" / "results.json").exists()
    shutil.rmtree(source)
    # Another encoder would not be taken: the run has its weights already.
    assert main(["tune", str(run), *LEARN, f"source={encoder.as_posix()}"]) == 2
    assert main(["tune", str(run), *LEARN]) == 0
    got, expected = state(tmp_path / "run", STEPS), state(tuned / "run", STEPS)
    assert got.keys() == expected.keys()
    for name, tensors in expected.items():
        for kind, tensor in tensors.items():
            assert torch.equal(got[name][kind], tensor), f"{kind} of {name}"
    assert curve(tmp_path / "run") == curve(tuned / "run")
    kept = ("loss", "accuracy", "num_examples", "step")
    assert [results(tmp_path / "run")[k] for k in kept] == [results(tuned / "run")[k] for k in kept]


def test_a_finished_run_is_evaluated_and_not_trained(tuned: Path) -> None:
    before, lines = results(tuned / "run"), read_metrics(tuned / "run")
    (tuned / "run" / "results.json").unlink()
    assert main(["tune", str(tuned / "tuning.toml"), *LEARN]) == 0
    assert results(tuned / "run") == before
    assert read_metrics(tuned / "run") == lines


def test_a_regression_reports_both_correlations(encoder: Path, tmp_path: Path) -> None:
    run = write_tuning(tmp_path, encoder, kind="stsb")
    assert main(["tune", str(run), "train.steps=4", "train.eval_every=2"]) == 0
    found = results(tmp_path / "run")
    assert {"loss", "pearson", "spearman", "num_examples"} <= found.keys()
    assert -1 <= found["pearson"] <= 1
    assert -1 <= found["spearman"] <= 1
    assert [line["step"] for line in read_metrics(tmp_path / "run", "eval")] == [2, 4]


def test_both_files_of_mnli_are_reported_apart(encoder: Path, tmp_path: Path) -> None:
    run = write_tuning(tmp_path, encoder)
    lines = (tmp_path / "dev.tsv").read_text().splitlines()[1:]
    labels = ("entailment", "contradiction")
    for name, chosen in (("dev.tsv", lines), ("train.tsv", lines), ("other.tsv", lines[:9])):
        rows = [line.split("\t") for line in chosen]
        text = "sentence1\tsentence2\tgold_label\n" + "".join(
            f"{row[0]}\tYes.\t{labels[int(row[1])]}\n" for row in rows
        )
        (tmp_path / name).write_text(text)
    files = {"train": "train.tsv", "validation": "dev.tsv", "mismatched": "other.tsv"}
    named = [f"task.{key}={(tmp_path / name).as_posix()}" for key, name in files.items()]
    assert main(["tune", str(run), "task.kind=mnli", *named, "train.steps=1"]) == 0
    found = results(tmp_path / "run")
    assert (found["num_examples"], found["mismatched_num_examples"]) == (37, 9)
    assert {"accuracy", "mismatched_accuracy", "mismatched_loss"} <= found.keys()


def refused(
    run: Path, words: list[str], capsys: pytest.CaptureFixture[str], *overrides: str
) -> None:
    assert main(["tune", str(run), *overrides]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for word in words:
        assert word in message, message


def test_bad_starts_are_refused_and_leave_nothing(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_tuning(tmp_path, encoder)
    refused(run, ["source", "holds no checkpoint"], capsys, f"source={tmp_path / 'nothing'}")
    refused(run, ["task.sequence_length: 49", "48 positions"], capsys, "task.sequence_length=49")
    refused(run, ["cannot be read"], capsys, "task.train=missing.tsv")
    files = [f"task.{key}={tmp_path / 'train.tsv'}" for key in ("train", "validation")]
    refused(run, ["no column 'question1'"], capsys, "task.kind=qqp", *files)
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nfine\t1\nbad line\nfine\t3\n")
    words = ["train.tsv: line 3: has 1 columns", "line 4: label is '3'", "task.max_bad_lines=2"]
    refused(run, words, capsys)
    assert not (tmp_path / "run").exists()


def test_other_models_and_other_runs_are_refused(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2 = write_run(tmp_path / "gpt2", prepare_markov(tmp_path / "data"))
    assert main(["train", str(gpt2), "train.steps=1", "train.schedule.warmup_steps=0"]) == 0
    capsys.readouterr()
    run = write_tuning(tmp_path, gpt2.parent / "run")
    refused(run, ["source", "kind gpt2", "only encoders"], capsys)
    refused(run, ["is a fine-tuning run"], capsys, f"source={tuned / 'run'}")
    refused(run, ["another kind"], capsys, f"folder={gpt2.parent / 'run'}")
    for command in ("eval", "inspect"):
        assert main([command, str(tuned / "run")]) == 2
        assert "holds a fine-tuned classifier" in capsys.readouterr().err


def test_changed_examples_are_refused_on_a_resume(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_tuning(tmp_path, encoder)
    short = ["train.steps=4", "checkpoint.every=2"]
    assert main(["tune", str(run), *short, "train.stop_after=2"]) == 0
    capsys.readouterr()
    with (tmp_path / "train.tsv").open("a") as file:
        file.write("Anna found the hat in the park.\t0\n")
    refused(run, ["the data are not those", "task.train: was"], capsys, *short)
    assert main(["tune", str(run), *short, "--allow-data-change"]) == 0
    refused(run, ["--fresh", "already holds a run at step 4"], capsys, *short, "--fresh")


def test_reordered_classes_are_refused_on_a_resume(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_tuning(tmp_path, encoder)
    files = {"train": "train.tsv", "validation": "dev.tsv"}
    own = ["task.kind=tsv", "task.text=sentence", "task.label=label", "train.steps=2"]
    own += [f"task.{key}={(tmp_path / name).as_posix()}" for key, name in files.items()]
    assert main(["tune", str(run), *own, "task.labels=['0', '1']", "train.stop_after=1"]) == 0
    capsys.readouterr()
    refused(
        run, ["the data are not those", "task.labels: was"], capsys, *own, "task.labels=['1', '0']"
    )
    assert main(["tune", str(run), *own, "task.labels=['0', '1']"]) == 0


def test_the_marks_of_the_encoder_decide_the_samples(tuned: Path) -> None:
    # Behind the 320 pieces stand mask, cls and sep.
    manifest = newest_manifest(tuned / "run")
    assert manifest is not None
    assert manifest.run.train_state["data"]["encoder.marks"] == [321, 322]


def test_dropout_before_the_classifier_is_that_of_the_run(encoder: Path, tmp_path: Path) -> None:
    losses = []
    for number, dropout in enumerate((0.0, 0.0, 0.9)):
        run = write_tuning(tmp_path / str(number), encoder)
        assert main(["tune", str(run), "train.steps=1", f"dropout={dropout}"]) == 0
        losses.append(read_metrics(run.parent / "run", "train")[0]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_source_whose_weights_are_not_those_of_its_model_is_refused(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_tuning(tmp_path, encoder)
    source = tmp_path / "source"
    shutil.copytree(encoder, source)
    manifest = newest_manifest(source)
    assert manifest is not None
    # Every weight of a model with fewer layers is there, and more: none may be passed over.
    manifest.run.config["model"]["num_layers"] = 1
    [path] = source.glob(f"checkpoints/step-*/{MANIFEST_NAME}")
    path.write_bytes(encode_manifest(manifest))
    refused(run, ["belongs to another model", "blocks.1."], capsys, f"source={source}")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def torn(encoder: Path, tmp_path: Path) -> Callable[[], Path]:
    """Write a fine-tuning run with a torn line among its examples."""

    def write() -> Path:
        run = write_tuning(tmp_path, encoder)
        with (tmp_path / "train.tsv").open("a") as file:
            file.write("torn\n")
        return run

    return write


def test_allowed_bad_lines_are_reported(
    torn: Callable[[], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["tune", str(torn()), "train.steps=1", "task.max_bad_lines=1"]) == 0
    assert "train.tsv: 1 unreadable line(s) left out, 90 examples" in capsys.readouterr().err
    assert results(tmp_path / "run")["num_training_examples"] == 90
