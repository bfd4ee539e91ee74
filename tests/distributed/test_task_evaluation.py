"""Metrics of a task do not depend on how many ranks evaluate, nor on who holds the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.engines import CPU_WORLD, zero
from scipy import stats

from mpotrain.data.collation import Samples
from mpotrain.data.tokenizer import IdentityTokenizer
from mpotrain.engine.config import LocalConfig
from mpotrain.engine.deepspeed import DeepSpeedEngine
from mpotrain.engine.local import LocalEngine
from mpotrain.models.classifier import Classifier
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.nn.config import MPOSite
from mpotrain.nn.sharing_config import SharingConfig
from mpotrain.parallel.ranks import World
from mpotrain.train.config import AdamWConfig
from mpotrain.train.optim import build_optimizer
from mpotrain.tune.encoding import ExampleEncoder
from mpotrain.tune.evaluation import TaskEvaluator
from mpotrain.tune.samples import TaskObjective, TaskSamples
from mpotrain.tune.task_file import Examples
from mpotrain.tune.tasks import TaskFormat

N, T, MICRO = 29, 12, 3
CONFIG = EncoderConfig(
    vocab_size=64,
    context_length=T,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    ffn_size=32,
    dropout=0.1,
    init_std=0.5,
    sites=EncoderSites(c_fc=MPOSite(in_modes=(4, 4), out_modes=(4, 8))),
    sharing=SharingConfig(scope="central"),
)
SCORES = TaskFormat("a", "b", "c", (), ("pearson", "spearman"))
CLASSES = TaskFormat("a", "b", "c", ("x", "y", "z"), ("accuracy", "matthews"))


def examples(form: TaskFormat, count: int) -> Examples:
    rng = np.random.default_rng(8)
    words = [" ".join(map(str, rng.integers(0, 60, rng.integers(1, 9)))) for _ in range(2 * count)]
    labels = rng.integers(0, 3, count)
    return Examples(
        path=Path("x"),
        digest="",
        texts=words[:count],
        pairs=words[count:],
        labels=labels.astype(np.float32 if form.is_regression else np.int64),
        num_bad=0,
    )


def evaluate(world: World, stage: int | None, form: TaskFormat) -> dict[str, Any]:
    """Return the metrics of two files, of which the second has fewer batches than ranks."""
    model = Classifier(CONFIG, num_outputs=form.num_outputs, head_dropout=0.1, seed=2)
    optimizer = build_optimizer(model, AdamWConfig())
    engine: Any
    if stage is None:
        local = LocalConfig(device="cpu")
        engine = LocalEngine(model, optimizer, config=local, world=world, seed=0, clip_norm=None)
    else:
        engine = DeepSpeedEngine(
            model, optimizer, config=zero(stage), world=world, seed=0, clip_norm=None,
            micro_batch_size=MICRO, accumulation=1, global_batch_size=MICRO * world.size,
        )  # fmt: skip
    tokens = ExampleEncoder(IdentityTokenizer(60), cls_id=61, sep_id=62, sequence_length=T)
    files = {
        "": TaskSamples(examples(form, N), T, 0),
        "small_": TaskSamples(examples(form, MICRO), T, 0),
    }
    return TaskEvaluator(engine, form, files, tokens, micro_batch_size=MICRO)()


def predictions(form: TaskFormat) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of all examples, one by one, and their labels."""
    model = Classifier(CONFIG, num_outputs=form.num_outputs, head_dropout=0.1, seed=2).eval()
    found = examples(form, N)
    tokens = ExampleEncoder(IdentityTokenizer(60), cls_id=61, sep_id=62, sequence_length=T)

    rows = Samples(np.arange(N)[:, None], range(N), fixed=True)
    batch = TaskObjective(found, tokens).collate(rows, N)
    with torch.no_grad():
        return model(batch, return_logits=True).logits.double().numpy(), found.labels


def test_scores_against_scipy() -> None:
    found = evaluate(CPU_WORLD, None, SCORES)
    x, y = predictions(SCORES)
    assert found["num_examples"] == N
    assert found["pearson"] == pytest.approx(stats.pearsonr(x[:, 0], y)[0], abs=1e-5)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x[:, 0], y)[0], abs=1e-9)
    assert found["loss"] == pytest.approx(np.mean((x[:, 0] - y) ** 2), rel=1e-5)
    assert abs(found["pearson"]) > 1e-3


def test_classes_against_single_examples() -> None:
    found = evaluate(CPU_WORLD, None, CLASSES)
    scores, labels = predictions(CLASSES)
    assert found["accuracy"] == pytest.approx(np.mean(scores.argmax(1) == labels))
    log_p = torch.from_numpy(scores).log_softmax(-1)
    assert found["loss"] == pytest.approx(-log_p[range(N), labels].mean().item(), rel=1e-5)


@pytest.mark.parametrize("form", [SCORES, CLASSES], ids=["scores", "classes"])
@pytest.mark.parametrize(("stage", "size"), [(1, 2), (3, 3)])
def test_metrics_are_the_same_on_all_ranks_of_any_world(
    stage: int, size: int, form: TaskFormat, run_ranks: Callable[[int], Callable[..., list[Any]]]
) -> None:
    expected = evaluate(CPU_WORLD, None, form)
    for found in run_ranks(size)(evaluate, stage, form):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
