"""Order and batches of examples: pure functions of position and seed, whatever the world."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mpotrain.data.loader import Loader
from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.tokenizer import IdentityTokenizer
from mpotrain.tune.encoding import ExampleEncoder
from mpotrain.tune.samples import TaskData, TaskObjective, TaskSamples
from mpotrain.tune.task_file import Examples

N = 23
ENCODER = ExampleEncoder(IdentityTokenizer(80), cls_id=90, sep_id=91, sequence_length=7)


def examples(*, scores: bool = False) -> Examples:
    labels = np.arange(N) % 3
    return Examples(
        path=Path("x.tsv"),
        digest="d",
        texts=[str(n) for n in range(N)],
        pairs=[f"{n} {n}" for n in range(N)],
        labels=labels.astype(np.float32) / 7 if scores else labels.astype(np.int64),
        num_bad=0,
    )


def loader(world: int, rank: int, *, seed: int = 4, scores: bool = False) -> Loader:
    found = examples(scores=scores)
    return Loader(
        TaskSamples(found, 7, seed),
        global_batch_size=2 * world if world == 3 else 8,
        micro_batch_size=2,
        objective=TaskObjective(found, ENCODER),
        rank=rank,
        world_size=world,
        prefetch=False,
    )


def step_rows(world: int, position: int, *, seed: int = 4) -> list[list[int]]:
    """Return the inputs of a whole step in their global order."""
    by_rank = [loader(world, rank, seed=seed).microbatches(position) for rank in range(world)]
    return [row for slot in zip(*by_rank, strict=True) for b in slot for row in b.inputs.tolist()]


def test_every_epoch_visits_every_example_once_in_an_order_of_its_own() -> None:
    samples = TaskSamples(examples(), 7, 4)
    orders = [[int(samples[e * N + n][0]) for n in range(N)] for e in range(3)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    # Read backwards it is the same order: nothing is remembered but the last epoch.
    assert [int(samples[n][0]) for n in reversed(range(N))] == orders[0][::-1]
    other = TaskSamples(examples(), 7, 5)
    assert [int(other[n][0]) for n in range(N)] != orders[0]
    with pytest.raises(IndexError):
        samples[-1]
    with pytest.raises(IndexError):
        samples.fixed(N)


@pytest.mark.parametrize("position", [0, 8, 160])
def test_all_worlds_read_the_same_examples(position: int) -> None:
    assert step_rows(1, position) == step_rows(2, position) == step_rows(4, position)
    assert step_rows(1, position) != step_rows(1, position, seed=6)


def test_a_batch_holds_the_example_of_each_sample() -> None:
    samples = TaskSamples(examples(), 7, 4)
    batch = loader(1, 0).microbatches(8)[1]
    assert batch.sample_ids.tolist() == [10, 11]
    for row, sample in enumerate((10, 11)):
        number = int(samples[sample][0])
        assert batch.inputs[row].tolist() == [90, number, 91, number, number, 91, 0]
        assert batch.targets[row].tolist() == [number % 3]
    assert batch.targets.shape == batch.loss_mask.shape == (2, 1)
    assert batch.targets.dtype == torch.int64
    assert batch.loss_mask.all()
    assert batch.document_ids is not None
    assert batch.token_types is not None
    assert batch.document_ids[0].tolist() == [1, 1, 1, 1, 1, 1, 0]
    assert batch.token_types[0].tolist() == [0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_reads_every_example_once(world: int) -> None:
    seen, labels = [], []
    for rank in range(world):
        for batch in loader(world, rank, scores=True).evaluation_batches():
            real = batch.loss_mask[:, 0]
            assert torch.equal(real, batch.sample_ids >= 0)
            assert not batch.document_ids[~real].any()
            seen += batch.inputs[real, 1].tolist()
            labels += batch.targets[real, 0].tolist()
            assert batch.targets.dtype == torch.float32
    order = np.argsort(seen)
    assert np.array(seen)[order].tolist() == list(range(N))
    assert np.array(labels)[order] == pytest.approx((np.arange(N) % 3) / 7)


def test_the_fingerprint_names_what_changed() -> None:
    entry = TokenizerEntry(kind="identity", digest="t", vocab_size=80)
    one, same, other = (
        TaskData(TaskSamples(examples(), 7, 4), entry, None, {"train.seed": seed})
        for seed in (4, 4, 5)
    )
    assert one.digest == same.digest != other.digest
    assert one.fingerprint["task.sequence_length"] == 7
