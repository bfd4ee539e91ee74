"""Kill, disk-full and damage during `prepare`: nothing half-written is ever taken for whole."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpotrain.data import shards
from mpotrain.data.config import PrepareConfig, SentencePieceConfig
from mpotrain.data.manifest import check_files, read_manifest
from mpotrain.data.prepare import prepare
from mpotrain.errors import DataError, StorageError

NUM_SHARDS = 3
NUM_PUBLISHED = 2 + 4 * NUM_SHARDS + 1
"""Renames of a whole call: settings, tokenizer, four for each shard, manifest."""

CHILD = """
import json, os, resource, signal, sys
from mpotrain import durable
from mpotrain.data import indexed
from mpotrain.data.config import PrepareConfig, SentencePieceConfig
from mpotrain.data.prepare import prepare

def main():
    source, out, job = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    published = 0
    original = durable.publish

    def publish(unfinished, final):
        nonlocal published
        published += 1
        if published == job.get("die_before"):
            os.kill(os.getpid(), signal.SIGKILL)
        original(unfinished, final)
        if published == job.get("die_after"):
            os.kill(os.getpid(), signal.SIGKILL)

    durable.publish = indexed.publish = publish
    documents = 0
    add_document = indexed.IndexedWriter.add_document

    def add(self, tokens):
        nonlocal documents
        documents += 1
        add_document(self, tokens)
        if documents == job.get("die_in_document"):
            self._stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if documents == job.get("pause_in_document"):
            print("paused", flush=True)
            signal.pause()

    indexed.IndexedWriter.add_document = add
    if "file_limit" in job:
        limit = job["file_limit"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    tokenizer = SentencePieceConfig(vocab_size=300)
    try:
        prepare(PrepareConfig(sources=(source,), out=out, tokenizer=tokenizer,
                              documents_per_shard=10, num_workers=job.get("workers", 0)))
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        sys.exit(getattr(error, "exit_code", 1))

if __name__ == "__main__":
    main()
"""


def make_texts():
    """28 documents of a small invented language, with enough different words for a vocabulary."""
    generator = random.Random(5)
    words = ["".join(generator.choices("abdegiklmnorstu", k=5)) for _ in range(80)]
    return [" ".join(generator.choices(words, k=20 + 3 * i)) + ".\n" for i in range(28)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus of three shards, the last one large, and its undisturbed result."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts()
    texts[25] *= 400
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "child.py").write_text(CHILD)
    prepare(settings(folder, folder / "reference"))
    return folder


def settings(place, out, **changes):
    values = {
        "sources": (str(place / "a.jsonl"),),
        "out": str(out),
        "tokenizer": SentencePieceConfig(vocab_size=300),
        "documents_per_shard": 10,
        "num_workers": 0,
    }
    return PrepareConfig(**{**values, **changes})


def child(place, out, **job):
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [
            sys.executable,
            str(place / "child.py"),
            str(place / "a.jsonl"),
            str(out),
            json.dumps(job),
        ],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def count_written(monkeypatch):
    written = []
    finish = shards.ShardWriter.finish

    def counting(self, source_digest):
        written.append(self.index)
        return finish(self, source_digest)

    monkeypatch.setattr(shards.ShardWriter, "finish", counting)
    return written


def whole_shards(out):
    return {int(path.stem[-5:]) for path in out.glob("shard-*.json")}


def assert_incomplete_then_mended(place, out, monkeypatch):
    """The folder is not taken for complete; a restart writes just what was missing."""
    with pytest.raises(DataError, match="interrupted"):
        read_manifest(out)
    done = whole_shards(out)
    written = count_written(monkeypatch)
    manifest = prepare(settings(place, out))
    assert set(written) == set(range(NUM_SHARDS)) - done
    assert len(written) == len(set(written))
    check_files(out, manifest, verify=True)
    assert content(out) == content(place / "reference")
    return done


@pytest.mark.parametrize("number", range(1, NUM_PUBLISHED + 1))
def test_killed_before_every_rename(place, tmp_path, monkeypatch, number):
    out = tmp_path / "out"
    assert child(place, out, die_before=number).wait(240) == -signal.SIGKILL
    done = assert_incomplete_then_mended(place, out, monkeypatch)
    assert len(done) == max(0, number - 3) // 4


def test_killed_after_the_record_of_a_shard(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert child(place, out, die_after=6).wait(240) == -signal.SIGKILL
    assert assert_incomplete_then_mended(place, out, monkeypatch) == {0}


def test_killed_after_the_manifest_is_complete(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert child(place, out, die_after=NUM_PUBLISHED).wait(240) == -signal.SIGKILL
    written = count_written(monkeypatch)
    prepare(settings(place, out))
    assert written == []
    assert content(out) == content(place / "reference")


@pytest.mark.parametrize("document", [1, 15, 28])
def test_killed_in_the_middle_of_a_shard(place, tmp_path, monkeypatch, document):
    out = tmp_path / "out"
    assert child(place, out, die_in_document=document).wait(240) == -signal.SIGKILL
    assert list(out.glob("*.tmp-*")), "the test wants a file that is half written"
    assert_incomplete_then_mended(place, out, monkeypatch)


def test_killed_three_times_in_a_row(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for document in (12, 12, 3):  # in the second, third and again third shard
        assert child(place, out, die_in_document=document).wait(240) == -signal.SIGKILL
    assert_incomplete_then_mended(place, out, monkeypatch)


def descendants(pid):
    """Processes whose parent is `pid` (Linux: the fourth field of /proc/N/stat)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_tokenizing_processes_end_with_a_killed_parent(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    process = child(place, out, workers=2, pause_in_document=15)
    assert process.stdout.readline() == "paused\n"
    workers = descendants(process.pid)
    assert len(workers) >= 2
    with pytest.raises(DataError, match="another `mpotrain prepare` is writing"):
        prepare(settings(place, out))
    process.kill()
    process.wait(120)
    deadline = time.monotonic() + 120
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if is_alive(pid)]
    assert assert_incomplete_then_mended(place, out, monkeypatch) == {0}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_tokenizing_process_is_reported(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code = CHILD.replace(
        '    if "file_limit" in job:',
        "    from mpotrain.data import workers\n"
        "    submit = workers.ProcessPoolExecutor.submit\n"
        "    def killing(self, *args):\n"
        "        future = submit(self, *args)\n"
        "        if len(self._processes) > 0 and not job.get('killed'):\n"
        "            job['killed'] = True\n"
        "            os.kill(next(iter(self._processes)), signal.SIGKILL)\n"
        "        return future\n"
        "    workers.ProcessPoolExecutor.submit = killing\n"
        '    if "file_limit" in job:',
    )
    (tmp_path / "child.py").write_text(code)
    (tmp_path / "a.jsonl").write_bytes((place / "a.jsonl").read_bytes())
    process = child(tmp_path, out, workers=2)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert "DataError a tokenizing process died" in output
    assert_incomplete_then_mended(place, out, monkeypatch)


def test_disk_full_by_file_size_limit(place, tmp_path, monkeypatch):
    """A real kernel limit: the third shard does not fit, what was finished before stays."""
    out = tmp_path / "out"
    sizes = {name: len(data) for name, data in content(place / "reference").items()}
    limit = max(size for name, size in sizes.items() if name != "shard-00002.bin") + 1024
    assert limit < sizes["shard-00002.bin"]
    process = child(place, out, file_limit=limit)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 4
    assert "StorageError" in output
    assert "shard-00002.bin" in output
    assert list(out.glob("*.tmp-*")) == []
    assert assert_incomplete_then_mended(place, out, monkeypatch) == {0, 1}


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 9, 15])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_at_every_kind_of_file(place, tmp_path, monkeypatch, number, code):
    out = tmp_path / "out"
    calls = 0
    fsync = os.fsync
    # Every published file is fsynced once itself, its folder once afterwards.
    fail_at = 2 * number - 1

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=os.strerror(code)):
            prepare(settings(place, out))
    assert calls == fail_at
    assert list(out.glob("*.tmp-*")) == []
    assert_incomplete_then_mended(place, out, monkeypatch)


@pytest.mark.parametrize("suffix", ["bin", "idx", "bytes.npy", "json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_shard_is_written_again(place, tmp_path, monkeypatch, suffix, damage):
    out = tmp_path / "out"
    prepare(settings(place, out))
    (out / "manifest.json").unlink()
    path = out / f"shard-00001.{suffix}"
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[:-1] if suffix != "json" else data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    written = count_written(monkeypatch)
    prepare(settings(place, out))
    assert written == [1]
    assert content(out) == content(place / "reference")


def test_changed_tokenizer_stops_the_restart(place, tmp_path):
    out = tmp_path / "out"
    prepare(settings(place, out))
    other = tmp_path / "other"
    prepare(settings(place, other, tokenizer=SentencePieceConfig(vocab_size=301)))
    (out / "manifest.json").unlink()
    (out / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match="the tokenizer was changed after shard-00000"):
        prepare(settings(place, out))


def test_source_that_changes_between_two_starts(place, tmp_path, monkeypatch):
    """A source without a content digest (as from a hub) is compared document by document."""
    from mpotrain.data import sources

    texts = make_texts()
    source = sources.TextSource("changing", {"kind": "hub"}, lambda: iter(texts))
    monkeypatch.setattr(sources, "open_sources", lambda config: [source])
    out = tmp_path / "out"
    prepare(settings(place, out))
    (out / "manifest.json").unlink()
    (out / "shard-00002.json").unlink()
    texts[5] += "and more"
    with pytest.raises(DataError, match="the source changed after shard-00000"):
        prepare(settings(place, out))
    del texts[5:]
    with pytest.raises(DataError, match="the source changed after shard-00000"):
        prepare(settings(place, out))
    assert not (out / "manifest.json").exists()


def test_bad_utf8_leaves_no_complete_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("good text " * 500)
    (tmp_path / "in" / "b.txt").write_bytes(b"bad \xff text")
    config = PrepareConfig(
        sources=(str(tmp_path / "in"),),
        out=str(tmp_path / "out"),
        tokenizer=SentencePieceConfig(vocab_size=300),
        num_workers=0,
    )
    with pytest.raises(DataError, match=r"b\.txt: byte 4 is not UTF-8"):
        prepare(config)
    with pytest.raises(DataError, match="interrupted"):
        read_manifest(tmp_path / "out")
    assert list((tmp_path / "out").glob("shard*")) == []


def test_unwritable_folder_is_a_storage_error(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        prepare(settings(place, tmp_path / "file" / "out"))
