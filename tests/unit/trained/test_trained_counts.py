"""What masked and T5 runs report in training and evaluation, against a computation by hand."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from pathlib import Path

import pytest
import torch
from encoder_runs import folder_of, prepare_stories, write_kind

from mpotrain.assemble import build_model
from mpotrain.batch import Batch
from mpotrain.cli import main
from mpotrain.config import RunConfig
from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.loader import Loader
from mpotrain.data.objective import open_objective
from mpotrain.data.stream import Split
from mpotrain.train.journal import read_metrics
from mpotrain.trained import evaluate_checkpoint, load_trained

STEPS, SEQUENCES, GLOBAL, LENGTH = 12, 11, 8, 48
# Without dropout the first step can be repeated without the engine's seeds.
OVERRIDES = [
    f"train.steps={STEPS}",
    f"train.eval_every={STEPS}",
    f"train.eval_sequences={SEQUENCES}",
    "train.schedule.warmup_steps=0",
    "model.dropout=0.0",
]
MORE = {"encoder": ["model.attention_dropout=0.0"], "t5": []}


@dataclass
class ByHand:
    """Sums over batches, each of plain formulas."""

    nats: float = 0.0
    num_tokens: int = 0
    num_right: int = 0
    pair_nats: float = 0.0
    num_pairs: int = 0
    num_pairs_right: int = 0

    def pair_metrics(self) -> dict[str, float]:
        return {
            "pair_loss": self.pair_nats / self.num_pairs,
            "pair_accuracy": self.num_pairs_right / self.num_pairs,
        }


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared short documents."""
    return prepare_stories(tmp_path_factory.mktemp("counts") / "data")


@pytest.fixture(scope="module")
def runs(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of a tiny encoder and a tiny T5 after a few steps."""
    root, folders = tmp_path_factory.mktemp("runs"), {}
    for kind, more in MORE.items():
        run = write_kind(kind, root / kind, stories)
        assert main(["train", str(run), *OVERRIDES, *more]) == 0
        folders[kind] = folder_of(run)
    return folders


def single_batches(run: RunConfig, split: Split) -> tuple[BlendedDataset, Loader]:
    """Open a split as batches of one sequence."""
    dataset = BlendedDataset(run.data, split)
    objective = open_objective(dataset)
    loader = Loader(
        dataset, objective=objective, global_batch_size=1, micro_batch_size=1, prefetch=False
    )
    return dataset, loader


def first_samples(loader: Loader) -> Iterator[Batch]:
    """Yield the samples of the first step."""
    for number in range(GLOBAL):
        yield from loader.microbatches(number)


def count(model: torch.nn.Module, batches: Iterator[Batch]) -> ByHand:
    """Add up losses and right answers target by target."""
    sums = ByHand()
    for batch in batches:
        with torch.no_grad():
            logits = model(batch, return_logits=True).logits.double()
        for row, column in batch.loss_mask.nonzero().tolist():
            scores, target = logits[row, column], int(batch.targets[row, column])
            sums.nats += float(scores.exp().sum().log() - scores[target])
            sums.num_right += int(scores.argmax()) == target
            sums.num_tokens += 1
        if batch.pair_labels is None:
            continue
        with torch.no_grad():
            hidden = model.hidden(batch)
        for row, column in (batch.pair_labels != -100).nonzero().tolist():
            with torch.no_grad():
                scores = model.pair_head(torch.tanh(model.pooler(hidden[row, column]))).double()
            label = int(batch.pair_labels[row, column])
            sums.pair_nats += float(scores.exp().sum().log() - scores[label])
            sums.num_pairs_right += int(scores.argmax()) == label
            sums.num_pairs += 1
    return sums


@pytest.mark.parametrize("kind", ["encoder", "t5"])
def test_an_evaluation_equals_a_computation_by_hand(runs: dict[str, Path], kind: str) -> None:
    trained = load_trained(runs[kind], None)
    _, loader = single_batches(trained.run, "validation")
    expected = count(trained.model, loader.evaluation_batches(SEQUENCES))
    found = evaluate_checkpoint(runs[kind], None, [], "validation", SEQUENCES)
    assert found is not None
    assert (found.num_sequences, found.num_tokens) == (SEQUENCES, expected.num_tokens)
    loss = expected.nats / expected.num_tokens
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(exp(loss), rel=1e-4)
    assert found.accuracy == pytest.approx(expected.num_right / expected.num_tokens, rel=1e-12)
    assert 0 < expected.num_right < expected.num_tokens
    assert found.bits_per_byte is None
    pairs = {"pair_loss": found.pair_loss, "pair_accuracy": found.pair_accuracy}
    if kind == "t5":
        assert pairs == {"pair_loss": None, "pair_accuracy": None}
        assert not pairs.keys() & found.to_json().keys()
        return
    assert pairs == pytest.approx(expected.pair_metrics(), rel=1e-5)
    assert 0 < expected.num_pairs_right < expected.num_pairs != expected.num_tokens
    assert pairs.items() <= found.to_json().items()
    assert f"accuracy {100 * pairs['pair_accuracy']:.2f} %" in found.describe()


@pytest.mark.parametrize("kind", ["encoder", "t5"])
def test_the_last_evaluation_of_a_run_is_that_of_its_checkpoint(
    runs: dict[str, Path], kind: str
) -> None:
    found = evaluate_checkpoint(runs[kind], None, [], "validation", SEQUENCES)
    assert found is not None
    recorded = read_metrics(runs[kind], "eval")[-1]
    assert recorded["step"] == STEPS
    for key, value in found.to_json().items():
        assert recorded.get(key) == value, key


@pytest.mark.parametrize("kind", ["encoder", "t5"])
def test_training_reports_loss_and_order_of_segments(runs: dict[str, Path], kind: str) -> None:
    run = load_trained(runs[kind], None).run
    model = build_model(run.model, seed=run.train.seed, dtype="fp32").eval()
    _, loader = single_batches(run, "train")
    expected = count(model, first_samples(loader))
    lines = read_metrics(runs[kind], "train")
    assert lines[0]["loss"] == pytest.approx(expected.nats / expected.num_tokens, rel=1e-5)
    for line in lines:
        assert "bits_per_byte" not in line
        assert ("pair_loss" in line, "pair_accuracy" in line) == (kind == "encoder",) * 2
    if kind == "encoder":
        assert {k: lines[0][k] for k in ("pair_loss", "pair_accuracy")} == pytest.approx(
            expected.pair_metrics(), rel=1e-5
        )


@pytest.mark.parametrize("kind", ["encoder", "t5"])
def test_speed_counts_the_tokens_that_are_read(runs: dict[str, Path], kind: str) -> None:
    first, *later = read_metrics(runs[kind], "train")
    assert "measured_tokens" not in first  # the first step of a start only warms up
    assert [line["measured_tokens"] for line in later] == [GLOBAL * LENGTH] * (STEPS - 1)
    # What is predicted is counted apart, and is less.
    steps = [b["tokens"] - a["tokens"] for a, b in zip([first, *later], later, strict=False)]
    assert all(0 < predicted < GLOBAL * LENGTH for predicted in steps)
