"""Kill and fill up: a checkpoint is whole or it is not one."""

import os
import random
import signal
import threading
import time

import pytest
import torch
from checkpoint_process import (
    COLLECTIVE_SECONDS,
    CONTEXT,
    differences,
    export,
    files_of,
    open_store,
    run_ranks_once,
    run_state,
    save_again,
    save_with_full_disk,
    start_ranks,
    state_after,
    train,
    train_and_report,
    train_ranks,
    train_ranks_one_dies,
    train_ranks_one_slow,
    train_until,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def names_in(folder):
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def run_child(target, *args):
    process = CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    process.join(240)
    return process.exitcode


def last_of(receiver, value):
    """Empty a pipe whose writer is dead and return the last thing it said."""
    try:
        while receiver.poll():
            value = receiver.recv()
    except EOFError:
        pass
    return value


def assert_finishes_like_an_undisturbed_run(folder, last_step, at_least):
    """Resume in this process; nothing before `at_least` may be lost, and no bit may differ."""
    before = open_store(folder).latest()
    assert (0 if before is None else before.step) >= at_least
    if before is not None:
        assert differences(open_store(folder), before.step) == []
    train(folder, last_step)
    store = open_store(folder)
    assert store.latest().step == last_step
    assert differences(store, last_step) == []
    assert store.steps() == [last_step, last_step - 1]
    assert not [path.name for path in folder.iterdir() if ".tmp-" in path.name]


POINTS = {
    "begin": 1,
    "part": 2,
    "part_written": 2,
    "reported": 1,
    "manifest": 1,
    "published": 1,
    "pointer": 1,
    "expired_hidden": 1,
    "end": 1,
}
COMPLETE_AT = {"published", "pointer", "expired_hidden", "end"}


@pytest.mark.parametrize("save", [1, 3])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point(folder, point, save):
    if point == "expired_hidden":  # passed from the third save on, when keep_last is 2
        occurrence = max(1, save - 2)
        save = occurrence + 2
    elif point.startswith("part"):
        parts = 3
        occurrence = (save - 1) * parts + POINTS[point]
    else:
        occurrence = save
    assert run_child(train_until, folder, 5, (point, occurrence), 2) == -signal.SIGKILL
    safe = save if point in COMPLETE_AT else save - 1
    assert_finishes_like_an_undisturbed_run(folder, 6, at_least=safe)


def test_killed_at_random_instants_again_and_again(folder):
    """One run that is killed 24 times and resumes 24 times ends like one that never was."""
    rng = random.Random(1)
    done, pace = 0, 0.05
    for trial in range(24):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=train_and_report, args=(folder, 10_000, sender), daemon=True
        )
        process.start()
        sender.close()
        receiver.recv()
        for _ in range(trial % 3):
            started = time.monotonic()
            done = receiver.recv()
            pace = min(2.0, time.monotonic() - started)
        time.sleep(rng.uniform(0.0, 1.5 * pace))
        process.kill()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        done = max(done, last_of(receiver, done))
        found = open_store(folder).latest()
        step = 0 if found is None else found.step
        assert step >= done
        assert found is None or differences(open_store(folder), step) == []
        done = step
    assert done >= 24
    assert_finishes_like_an_undisturbed_run(folder, done + 3, at_least=done)


@pytest.mark.parametrize(
    ("point", "replaced"),
    [
        ("part_written", False),
        ("manifest", False),
        ("set_aside", False),
        ("published", True),
        ("pointer", True),
        ("replaced_hidden", True),
        ("end", True),
    ],
)
def test_same_step_saved_again_is_never_mixed(folder, point, replaced):
    train(folder, 1, keep_last=1)
    assert run_child(save_again, folder, 1, (point, 1)) == -signal.SIGKILL
    sign = -1 if replaced else 1
    for _ in range(2):  # before and after the next writer has cleaned up
        store = open_store(folder)
        assert store.latest().step == 1
        for name, kinds in state_after(1).items():
            for kind, tensor in store.open(1).read(name).items():
                assert torch.equal(tensor, sign * kinds[kind])
        store.claim()
    assert [path.name for path in folder.iterdir() if path.name.startswith("step")] == [
        "step-00000001"
    ]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_there_is_always_a_checkpoint_while_retention_works(folder, keep_last):
    """Watch the folder all the time: once one is published, there is never none."""
    stop, counts = threading.Event(), []

    def watch():
        while not stop.is_set():
            names = names_in(folder)
            counts.append(sum("step" in name and "." not in name for name in names))

    train(folder, 1)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(folder, 12, keep_last=keep_last)
    finally:
        stop.set()
        watcher.join()
    assert len(counts) > 20
    assert min(counts) >= 1
    assert open_store(folder).steps() == list(range(12, 12 - keep_last, -1))


def test_two_ranks_save_and_any_world_resumes(folder, tmp_path):
    answers = run_ranks_once(2, tmp_path / "meet", train_ranks, folder, 3)
    assert answers == [["step 3"], ["step 3"]]
    manifest = open_store(folder).latest()
    assert {name.partition("-part")[0] for name in manifest.files} == {"rank-00000", "rank-00001"}
    assert differences(open_store(folder), 3) == []
    train(folder, 5)
    answers = run_ranks_once(3, tmp_path / "meet again", train_ranks, folder, 7)
    assert answers == [["step 7"]] * 3


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("point", ["part_written", "reported"])
def test_one_rank_dies_while_saving(folder, tmp_path, point, victim):
    occurrence = {"part_written": 5, "reported": 3}[point]
    if point == "part_written":
        occurrence = 2 * 2 + 1  # two parts for each rank, in the third save
    processes, answers = start_ranks(
        2, tmp_path / "meet", train_ranks_one_dies, folder, 5, (point, occurrence), victim
    )
    started = time.monotonic()
    _, error = answers.get(timeout=240)
    for process in processes:
        process.join(240)
    assert time.monotonic() - started < COLLECTIVE_SECONDS / 2  # noticed, not timed out
    assert isinstance(error, RuntimeError), error
    assert processes[victim].exitcode == -signal.SIGKILL
    if not (point == "reported" and victim == 1):
        assert (folder / "latest").read_text() == "step-00000002\n"
        assert open_store(folder).latest().step == 2
    assert_finishes_like_an_undisturbed_run(folder, 6, at_least=2)


def test_pointer_waits_for_the_slow_rank(folder, tmp_path):
    processes, answers = start_ranks(2, tmp_path / "meet", train_ranks_one_slow, folder, 3, 1.5)
    early, seen = [], 0
    while any(process.is_alive() for process in processes):
        names = names_in(folder) if folder.exists() else set()
        pointer = (folder / "latest").read_text() if "latest" in names else ""
        finished = (tmp_path / "rank 1 is done").exists()  # last: it may come at any time
        if not finished and ("step-00000003" in names or pointer == "step-00000003\n"):
            early.append(names)
        seen += any(name.startswith("step-00000003.tmp-") for name in names)
        time.sleep(0.02)
    assert [answers.get(timeout=60)[1] for _ in processes] == ["done", "done"]
    assert early == []
    assert seen > 5
    assert (folder / "latest").read_text() == "step-00000003\n"


@pytest.mark.parametrize("limit", [0, 700, 3500])
@pytest.mark.parametrize("victim", [0, 1])
def test_disk_full_on_one_rank(folder, tmp_path, victim, limit):
    run_ranks_once(2, tmp_path / "meet", train_ranks, folder, 2)
    answers = run_ranks_once(2, tmp_path / "again", save_with_full_disk, folder, 3, victim, limit)
    for answer in answers:
        assert answer.startswith("StorageError: ")
        assert f"rank {victim}, whose share is 4,608 bytes: {folder}/step-00000003.tmp-" in answer
        assert ".safetensors: File too large" in answer
        assert "bytes are free there" in answer
        assert "left ['step-00000001', 'step-00000002']" in answer
        assert answer.endswith("previous 2\nnow 3")
    assert differences(open_store(folder), 3) == []


def test_manifest_that_cannot_be_written_is_an_error_on_all_ranks(folder, tmp_path):
    run_ranks_once(2, tmp_path / "meet", train_ranks, folder, 2)
    parts = [path.stat().st_size for path in files_of(folder / "step-00000002")[1:]]
    limit = max(parts) + 1
    assert limit < (folder / "step-00000002" / "manifest.json").stat().st_size
    answers = run_ranks_once(2, tmp_path / "again", save_with_full_disk, folder, 3, 0, limit)
    for answer in answers:
        assert answer.startswith(f"StorageError: rank 0: {folder}/step-00000003.tmp-")
        assert "/manifest.json: File too large" in answer
        assert "left ['step-00000001', 'step-00000002']" in answer
        assert answer.endswith("previous 2\nnow 3")


@pytest.fixture
def two_steps(folder):
    train(folder, 2)
    return folder


def test_dead_pointer_and_litter_do_not_matter(two_steps):
    (two_steps / "latest").write_text("step-99999999\n")
    (two_steps / "step-00000009.tmp-0123abcd").mkdir()
    (two_steps / "step-00000009.tmp-0123abcd" / "manifest.json").write_text("{")
    (two_steps / "README").write_text("mine")
    train(two_steps, 3)
    assert (two_steps / "latest").read_text() == "step-00000003\n"
    assert (two_steps / "README").read_text() == "mine"
    assert not (two_steps / "step-00000009.tmp-0123abcd").exists()


def test_second_run_in_the_same_folder_is_refused(two_steps):
    store = open_store(two_steps)
    store.claim()
    try:
        assert run_child(train_until, two_steps, 9, None, 2) == 1
        assert open_store(two_steps).latest().step == 2
    finally:
        store.close()
    assert run_child(train_until, two_steps, 3, None, 2) == 0
    assert open_store(two_steps).latest().step == 3


def test_saved_values_are_those_of_the_moment_of_saving(folder):
    """What training does to the tensors right after `save` returns changes nothing on disk."""
    store = open_store(folder)
    for step in range(1, 6):
        state = state_after(step)
        store.save(run_state(step), export(state, store.world))
        for kinds in state.values():
            for tensor in kinds.values():
                tensor.zero_()
        assert differences(open_store(folder), step) == []
