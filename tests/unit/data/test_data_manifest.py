"""Manifests and durable files: whole or absent, and any change shows."""

import dataclasses
import errno
import json
import os

import pytest

from mpotrain.data.manifest import (
    Manifest,
    ShardEntry,
    TokenizerEntry,
    check_files,
    file_digest,
    read_manifest,
    tokenizer_digest,
    write_manifest,
)
from mpotrain.durable import remove_unfinished, write_durably
from mpotrain.errors import DataError, StorageError


def make_folder(folder):
    files = {"bin": b"tokens", "idx": b"index!", "bytes.npy": b"lengths"}
    for suffix, data in files.items():
        (folder / f"shard-00000.{suffix}").write_bytes(data)
    (folder / "tokenizer.model").write_bytes(b"model")
    content = file_digest(folder / "tokenizer.model")
    shard = ShardEntry(
        name="shard-00000",
        num_documents=2,
        num_tokens=3,
        num_bytes=11,
        num_bin_bytes=6,
        num_idx_bytes=6,
        bin_digest=file_digest(folder / "shard-00000.bin"),
        idx_digest=file_digest(folder / "shard-00000.idx"),
        bytes_digest=file_digest(folder / "shard-00000.bytes.npy"),
        source_digest="s",
    )
    manifest = Manifest(
        dtype="uint16",
        tokenizer=TokenizerEntry(
            kind="sentencepiece",
            file="tokenizer.model",
            digest=tokenizer_digest("sentencepiece", content, 300, 2),
            vocab_size=300,
            eot_id=2,
        ),
        shards=(shard,),
        settings_digest="x",
        extra={"entropy_rate": 1.25},
    )
    write_manifest(folder, manifest)
    return manifest


def test_round_trip(tmp_path):
    manifest = make_folder(tmp_path)
    assert read_manifest(tmp_path) == manifest
    check_files(tmp_path, manifest, verify=True)
    assert (manifest.num_documents, manifest.num_tokens, manifest.num_bytes) == (2, 3, 11)


def test_digest_follows_tokens_and_tokenizer_only(tmp_path):
    manifest = make_folder(tmp_path)
    same = dataclasses.replace(manifest, sources=("moved",), settings_digest="y", extra={})
    assert same.digest == manifest.digest
    shard = dataclasses.replace(manifest.shards[0], bin_digest="0")
    tokenizer = dataclasses.replace(manifest.tokenizer, eot_id=3)
    for changes in ({"shards": (shard,)}, {"tokenizer": tokenizer}, {"dtype": "int32"}):
        assert dataclasses.replace(manifest, **changes).digest != manifest.digest


@pytest.mark.parametrize("name", ["bin", "idx", "bytes.npy"])
def test_damage_is_found(tmp_path, name):
    manifest = make_folder(tmp_path)
    path = tmp_path / f"shard-00000.{name}"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match=f"{name} was changed"):
        check_files(tmp_path, manifest, verify=True)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        check_files(tmp_path, manifest)


def test_truncation_is_found_without_reading(tmp_path):
    manifest = make_folder(tmp_path)
    (tmp_path / "shard-00000.bin").write_bytes(b"toke")
    (tmp_path / "shard-00000.idx").write_bytes(b"inde")
    with pytest.raises(DataError) as caught:
        check_files(tmp_path, manifest)
    assert "shard-00000.bin" in str(caught.value)
    assert "shard-00000.idx" in str(caught.value)


def test_changed_tokenizer_is_always_found(tmp_path):
    manifest = make_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"mOdel")
    with pytest.raises(DataError, match=r"tokenizer\.model: the tokenizer was changed"):
        check_files(tmp_path, manifest)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: "{", "is damaged"),
        (lambda c: "[]", "format version None"),
        (lambda c: json.dumps({**c, "format_version": 99}), "format version 99"),
        (lambda c: json.dumps({**c, "dtype": 3}), "dtype"),
        (lambda c: json.dumps({**c, "surprise": 3}), "surprise"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "shards"}), "shards"),
    ],
)
def test_damaged_manifest_is_refused(tmp_path, damage, reason):
    make_folder(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(DataError, match=reason) as caught:
        read_manifest(tmp_path)
    assert "manifest.json" in str(caught.value)


def test_missing_folder_and_manifest(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        read_manifest(tmp_path / "no")
    with pytest.raises(DataError, match="interrupted"):
        read_manifest(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_durably(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_remove_unfinished_spares_finished_files(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "a.idx.tmp-123").write_bytes(b"x")
    assert remove_unfinished(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
