from __future__ import annotations

import dataclasses
import random
import threading
import time

import numpy as np
import pytest
import torch
from prepared_folder import write_folder

from mpotrain.data.config import DataConfig, SourceConfig
from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.loader import PADDING_ID, Loader
from mpotrain.data.synthetic import positions
from mpotrain.errors import ParallelError

T = 6
G = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    source = positions(150, seed=4, min_length=2, max_length=30)
    folder = tmp_path_factory.mktemp("loader") / "positions"
    write_folder(folder, list(source.documents), vocab_size=source.vocab_size)
    sources = (SourceConfig(path=str(folder)),)
    return DataConfig(sources=sources, sequence_length=T, seed=8, split=(0.8, 0.2, 0.0))


@pytest.fixture(scope="module")
def train(data):
    return BlendedDataset(data, "train")


@pytest.fixture(scope="module")
def validation(data):
    return BlendedDataset(data, "validation")


class Numbers:
    """Samples that are their own number; can wait, fail and tell what was read."""

    sequence_length = T
    num_samples = 100

    def __init__(self) -> None:
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.fail_at: int | None = None
        self.gate: threading.Event | None = None

    def __getitem__(self, index: int) -> np.ndarray:
        if self.gate is not None and threading.current_thread().name.startswith("loader"):
            assert self.gate.wait(60)
        if index == self.fail_at:
            raise OSError(f"disk lost sample {index}")
        self.read.append(index)
        self.threads.add(threading.current_thread().name)
        return index * 1000 + np.arange(T + 1)

    def fixed(self, index: int) -> np.ndarray:
        return self[index]


def step_of(dataset, consumed: int, world: int, micro: int, global_size: int = G, **options):
    """The micro-batches of all ranks in the order of their numbers."""
    by_rank = []
    for rank in range(world):
        with Loader(
            dataset,
            global_batch_size=global_size,
            micro_batch_size=micro,
            rank=rank,
            world_size=world,
            **options,
        ) as loader:
            by_rank.append(loader.microbatches(consumed))
    assert len({len(batches) for batches in by_rank}) == 1
    return [batch for slot in zip(*by_rank, strict=True) for batch in slot]


def joined(batches, name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


# ---- training order


def test_batch_holds_samples_targets_and_numbers(train):
    (batch,) = step_of(train, 5 * G, world=1, micro=G)
    assert batch.sample_ids.tolist() == list(range(60, 72))
    for row, number in enumerate(range(60, 72)):
        tokens = train[number]
        assert batch.inputs[row].tolist() == tokens[:-1].tolist()
        assert batch.targets[row].tolist() == tokens[1:].tolist()
    assert batch.inputs.dtype == batch.targets.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool
    assert batch.num_tokens == G * T
    assert batch.inputs.is_contiguous()
    assert batch.targets.is_contiguous()


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 3), (3, 2), (4, 3), (6, 1), (6, 2)])
@pytest.mark.parametrize("consumed", [0, 3 * G, 10_000 * G + 7])
def test_same_global_batch_in_every_world(train, world, micro, consumed):
    (expected,) = step_of(train, consumed, world=1, micro=G)
    batches = step_of(train, consumed, world, micro)
    for number, batch in enumerate(batches):
        first = consumed + number * micro
        assert batch.sample_ids.tolist() == list(range(first, first + micro))
    for name in ("inputs", "targets", "loss_mask", "sample_ids"):
        assert torch.equal(joined(batches, name), getattr(expected, name))


def test_ledger_over_three_epochs_with_kills_and_changing_worlds(train):
    """Every token position is visited exactly once an epoch, whatever happened to the run."""
    generator = random.Random(0)
    n = train.num_samples
    visited: list[int] = []
    while len(visited) < 3 * n:
        # A restart: other world, other micro-batch, only the number of samples is known.
        world, micro = generator.choice([(1, 4), (2, 6), (3, 1), (4, 3), (6, 2)])
        loaders = [
            Loader(train, global_batch_size=G, micro_batch_size=micro, rank=r, world_size=world)
            for r in range(world)
        ]
        for _ in range(generator.randrange(1, 9)):
            by_rank = [loader.microbatches(len(visited)) for loader in loaders]
            step = [batch for slot in zip(*by_rank, strict=True) for batch in slot]
            numbers = joined(step, "sample_ids").tolist()
            assert numbers == list(range(len(visited), len(visited) + G))
            visited += joined(step, "inputs")[:, 0].tolist()
            # A step that was read but never finished: the kill comes before its samples count.
            if generator.random() < 0.2:
                for loader in loaders:
                    loader.microbatches(len(visited))
                break
        for loader in loaders:
            loader.close()
    expected = sorted(int(train.fixed(k)[0]) for k in range(n))
    for epoch in range(3):
        assert sorted(visited[epoch * n : (epoch + 1) * n]) == expected
    assert visited[:n] != visited[n : 2 * n]


def test_global_batch_may_change_in_the_middle(train):
    first = joined(step_of(train, 0, 2, 3, global_size=12), "inputs")
    second = joined(step_of(train, 12, 3, 2, global_size=24), "inputs")
    whole = joined(step_of(train, 0, 1, 36, global_size=36), "inputs")
    assert torch.equal(torch.cat([first, second]), whole)


@pytest.mark.parametrize(("global_size", "micro", "world"), [(12, 5, 1), (12, 4, 2), (0, 1, 1)])
def test_sizes_that_do_not_divide_are_refused(train, global_size, micro, world):
    with pytest.raises(ParallelError, match="global_batch_size"):
        Loader(train, global_batch_size=global_size, micro_batch_size=micro, world_size=world)


def test_impossible_ranks_and_positions_are_refused(train):
    with pytest.raises(ValueError, match="rank 2"):
        Loader(train, global_batch_size=G, micro_batch_size=3, rank=2, world_size=2)
    with (
        Loader(train, global_batch_size=G, micro_batch_size=3) as loader,
        pytest.raises(ValueError, match="-12"),
    ):
        loader.microbatches(-12)


# ---- prefetch


def test_prefetch_reads_the_next_step_in_another_thread():
    dataset = Numbers()
    with Loader(dataset, global_batch_size=4, micro_batch_size=2) as loader:
        loader.microbatches(0)
        deadline = time.monotonic() + 60
        while len(dataset.read) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert dataset.read == list(range(8))
        assert any(name.startswith("loader") for name in dataset.threads)
        loader.microbatches(4)
        assert dataset.read[:8] == list(range(8))  # nothing was read twice
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_without_prefetch_nothing_is_read_ahead():
    dataset = Numbers()
    with Loader(dataset, global_batch_size=4, micro_batch_size=2, prefetch=False) as loader:
        loader.microbatches(0)
        loader.microbatches(4)
    assert dataset.read == list(range(8))
    assert dataset.threads == {threading.current_thread().name}


def test_prefetch_never_changes_what_comes(train):
    positions = [0, G, 2 * G, 2 * G, 7 * G, 8 * G, 0, 10**9, 10**9 + G, G]
    with (
        Loader(train, global_batch_size=G, micro_batch_size=3) as ahead,
        Loader(train, global_batch_size=G, micro_batch_size=3, prefetch=False) as plain,
    ):
        for position in positions:
            one, two = ahead.microbatches(position), plain.microbatches(position)
            assert torch.equal(joined(one, "inputs"), joined(two, "inputs"))
            assert torch.equal(joined(one, "sample_ids"), joined(two, "sample_ids"))


def test_jump_does_not_wait_for_what_was_read_ahead_in_vain():
    dataset = Numbers()
    with Loader(dataset, global_batch_size=2, micro_batch_size=2) as loader:
        dataset.gate = threading.Event()
        loader.microbatches(0)  # samples 2 and 3 are now stuck in the background
        dataset.fail_at = 2
        assert loader.microbatches(40)[0].sample_ids.tolist() == [40, 41]
        assert not dataset.gate.is_set()
        dataset.gate.set()
        assert loader.microbatches(42)[0].sample_ids.tolist() == [42, 43]


def test_failure_in_the_background_is_raised_where_the_samples_are_wanted():
    dataset = Numbers()
    dataset.fail_at = 5
    with Loader(dataset, global_batch_size=4, micro_batch_size=2) as loader:
        loader.microbatches(0)
        with pytest.raises(OSError, match="sample 5"):
            loader.microbatches(4)
        dataset.fail_at = None
        assert loader.microbatches(4)[0].sample_ids.tolist() == [4, 5]


def test_close_ends_the_thread_and_the_loader():
    dataset = Numbers()
    loader = Loader(dataset, global_batch_size=4, micro_batch_size=2)
    loader.microbatches(0)
    loader.close()
    loader.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
    with pytest.raises(ValueError, match="closed"):
        loader.microbatches(4)
    with pytest.raises(ValueError, match="closed"):
        loader.evaluation_batches()


def test_evaluation_in_between_does_not_disturb_training():
    dataset = Numbers()
    with Loader(dataset, global_batch_size=4, micro_batch_size=2) as loader:
        loader.microbatches(0)
        assert len(list(loader.evaluation_batches(10))) == 5
        assert joined(loader.microbatches(4), "sample_ids").tolist() == [4, 5, 6, 7]


# ---- evaluation


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("num_sequences", [1, 7, 24, None])
def test_evaluation_is_the_same_set_in_every_world(validation, world, micro, num_sequences):
    wanted = validation.num_samples if num_sequences is None else num_sequences
    assert validation.num_samples > 24
    rows: dict[int, list[int]] = {}
    num_batches = set()
    for rank in range(world):
        with Loader(
            validation,
            global_batch_size=micro * world,
            micro_batch_size=micro,
            rank=rank,
            world_size=world,
        ) as loader:
            batches = list(loader.evaluation_batches(num_sequences))
        num_batches.add(len(batches))
        for batch in batches:
            assert batch.inputs.shape == batch.loss_mask.shape == (micro, T)
            for row in range(micro):
                number = int(batch.sample_ids[row])
                if number == PADDING_ID:
                    assert not batch.loss_mask[row].any()
                    continue
                assert batch.loss_mask[row].all()
                assert number not in rows
                rows[number] = [*batch.inputs[row].tolist(), int(batch.targets[row][-1])]
    assert num_batches == {-(-wanted // (micro * world))}
    # The sequences are spread evenly over the whole split.
    numbers = [n * validation.num_samples // wanted for n in range(wanted)]
    assert len(set(numbers)) == wanted
    assert rows == {number: validation.fixed(number).tolist() for number in numbers}


def test_evaluation_asks_for_no_more_than_there_is(validation):
    with Loader(validation, global_batch_size=2, micro_batch_size=2) as loader:
        masks = [batch.num_tokens for batch in loader.evaluation_batches(10**9)]
        assert sum(masks) == validation.num_samples * T
        with pytest.raises(ValueError, match="at least one"):
            loader.evaluation_batches(0)


def test_evaluation_does_not_depend_on_the_seed_and_shares_nothing_with_training(data, train):
    seen = set()
    for seed in (1, 2):
        dataset = BlendedDataset(dataclasses.replace(data, seed=seed), "validation")
        with Loader(dataset, global_batch_size=4, micro_batch_size=4) as loader:
            tokens = torch.cat(
                [batch.inputs[batch.loss_mask] for batch in loader.evaluation_batches()]
            )
        seen.add(tuple(tokens.tolist()))
    assert len(seen) == 1
    trained = {token for number in range(train.num_samples) for token in train[number].tolist()}
    assert trained.isdisjoint(seen.pop())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_are_page_locked(train):
    with Loader(train, global_batch_size=4, micro_batch_size=2, pin_memory=True) as loader:
        for _ in range(2):
            for batch in loader.microbatches(0):
                assert batch.inputs.is_pinned()
                assert batch.sample_ids.is_pinned()
                assert torch.equal(batch.to(torch.device("cuda")).inputs.cpu(), batch.inputs)
