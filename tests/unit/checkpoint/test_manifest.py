import dataclasses
import json

import pytest
import xxhash

from mpotrain.checkpoint.compare import (
    config_differences,
    parameter_differences,
    require_model,
)
from mpotrain.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Placement,
    TensorEntry,
    fingerprint,
    signatures,
)
from mpotrain.checkpoint.manifest_file import (
    FORMAT,
    decode_manifest,
    encode_manifest,
    library_versions,
    read_manifest,
)
from mpotrain.errors import CheckpointError


@pytest.fixture
def manifest(run_state):
    def entry(role, shape, offset, size):
        return TensorEntry(
            role=role,
            shape=shape,
            kinds={"weight": Placement(file="a.bin", offset=offset, bytes=size, dtype="F32")},
        )

    tensors = {"w": entry("central", (2, 3), 8, 24), "b": entry("dense", (), 32, 4)}
    return Manifest(
        format=FORMAT,
        run=run_state(12),
        versions=library_versions(),
        fingerprint=fingerprint({name: (t.role, t.shape) for name, t in tensors.items()}),
        tensors=tensors,
        files={"a.bin": FileEntry(bytes=36, digest="0" * 32)},
    )


def signed(manifest_text, change):
    """Change the JSON and sign it anew, as somebody hostile would."""
    data = json.loads(manifest_text)
    del data["digest"]
    change(data)
    body = json.dumps(data, indent=1).encode().removesuffix(b"\n}")
    return body + f',\n "digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()


def test_round_trip(manifest):
    again = decode_manifest(encode_manifest(manifest), "m")
    assert again.tensors == manifest.tensors
    assert again.files == manifest.files
    assert again.run.train_state == {"tokens": 123, "skipped": [3, 4]}
    assert again.run.config["model"]["modes"] == [2, 3]
    assert dataclasses.replace(again.run, config={}) == dataclasses.replace(manifest.run, config={})
    assert (again.step, again.num_bytes) == (12, 36)


def test_text_is_ordinary_json(manifest):
    data = json.loads(encode_manifest(manifest))
    assert data["run"]["consumed_samples"] == 96
    assert data["tensors"]["w"]["shape"] == [2, 3]


def test_every_flipped_bit_is_seen(manifest):
    text = encode_manifest(manifest)
    for position in range(len(text)):
        for bit in (0, 5):
            broken = bytearray(text)
            broken[position] ^= 1 << bit
            with pytest.raises(CheckpointError, match=r"^m: "):
                decode_manifest(bytes(broken), "m")


@pytest.mark.parametrize("length", [0, 1, 40, 60, 500, -1])
def test_truncation_is_seen(manifest, length):
    with pytest.raises(CheckpointError):
        decode_manifest(encode_manifest(manifest)[:length], "m")


CHANGES = {
    "unknown key": (lambda d: d["run"].update(extra=1), "run.extra"),
    "text for a number": (lambda d: d["run"].update(step="12"), "run.step"),
    "missing key": (lambda d: d["run"].pop("rng"), "run.rng"),
    "other format": (lambda d: d.update(format=99), "format 99"),
    "path outside": (
        lambda d: (
            d["files"].update({"../x": d["files"].pop("a.bin")}),
            [t["kinds"]["weight"].update(file="../x") for t in d["tensors"].values()],
        ),
        "files.../x: not a plain file name",
    ),
    "foreign file": (
        lambda d: d["tensors"]["w"]["kinds"]["weight"].update(file="b.bin"),
        "not among the files",
    ),
    "beyond the end": (
        lambda d: d["tensors"]["w"]["kinds"]["weight"].update(offset=16),
        "beyond the end",
    ),
    "before the start": (
        lambda d: d["tensors"]["w"]["kinds"]["weight"].update(offset=-4),
        "beyond the end",
    ),
    "unknown type": (
        lambda d: d["tensors"]["w"]["kinds"]["weight"].update(dtype="OBJ"),
        "unknown element type",
    ),
    "negative shape": (lambda d: d["tensors"]["w"].update(shape=[-2, -3]), "impossible shape"),
    "other shape": (lambda d: d["tensors"]["w"].update(shape=[2, 4]), "needs 32"),
    "no weight": (lambda d: d["tensors"]["w"].update(kinds={}), "has no weight"),
    "other role": (lambda d: d["tensors"]["w"].update(role="dense"), "fingerprint"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_contradictions_are_named_even_when_signed(manifest, name):
    change, message = CHANGES[name]
    with pytest.raises(CheckpointError) as caught:
        decode_manifest(signed(encode_manifest(manifest), change), "m")
    assert message in str(caught.value)


@pytest.mark.parametrize("body", [b"[" * 100_000, b"{}", b'{"format": [1', b"\xff\xfe", b"[1]"])
def test_signed_rubbish_is_refused(body):
    text = body + f',\n "digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()
    with pytest.raises(CheckpointError):
        decode_manifest(text, "m")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("state", "key"),
    [
        ({"loss": float("nan")}, "run.train_state.loss"),
        ({"a": [1, {"b": float("inf")}]}, "run.train_state.a[1].b"),
        ({"a": object()}, "run.train_state.a"),
        ({1: 2}, "run.train_state"),
    ],
)
def test_what_json_cannot_hold_is_named(manifest, run_state, state, key):
    broken = dataclasses.replace(manifest, run=run_state(12, train_state=state))
    with pytest.raises(CheckpointError) as caught:
        encode_manifest(broken)
    assert f"{key}: " in str(caught.value)


def test_fingerprint_depends_on_names_roles_and_shapes_only():
    base = {"a": ("dense", (2, 3)), "b": ("central", (4,))}
    assert fingerprint(base) == fingerprint(dict(reversed(base.items())))
    others = [
        {"a": ("dense", (2, 3)), "c": ("central", (4,))},
        {"a": ("dense", (3, 2)), "b": ("central", (4,))},
        {"a": ("dense", (2, 3)), "b": ("auxiliary", (4,))},
        {"a": ("dense", (2, 3))},
    ]
    assert len({fingerprint(other) for other in [base, *others]}) == 5


def test_same_model_is_accepted(manifest):
    require_model(manifest, signatures(manifest), {"model": {"hidden": 7}})


def test_other_model_is_refused_with_parameters_and_keys(manifest):
    wanted = {"w": ("central", (2, 4)), "c": ("dense", (1,))}
    config = {"model": {"hidden": 7, "modes": [2, 3]}, "train": {"lr": 0.1}, "new": {"x": 1}}
    with pytest.raises(CheckpointError) as caught:
        require_model(manifest, wanted, config)
    assert str(caught.value).splitlines() == [
        "the checkpoint of step 12 belongs to another model:",
        "  b: the checkpoint has it, the model does not",
        "  c: the model has it, the checkpoint does not",
        "  w: shape [2, 3] in the checkpoint, now [2, 4]",
        "these keys of the configuration differ (checkpoint -> now):",
        "  model.hidden: 6 -> 7",
        "  new.x: 'absent' -> 1",
    ]


def test_role_counts_as_a_difference():
    assert parameter_differences({"w": ("dense", (1,))}, {"w": ("central", (1,))}) == [
        "w: role dense in the checkpoint, now central"
    ]


def test_long_lists_are_cut(manifest):
    wanted = {f"p{index}": ("dense", (1,)) for index in range(40)}
    with pytest.raises(CheckpointError, match="and 36 more"):
        require_model(manifest, wanted)


def test_config_differences_look_into_lists():
    saved = {"data": {"blend": [{"path": "a", "weight": 1.0}]}}
    changed = {"data": {"blend": [{"path": "a", "weight": 2.0}]}}
    assert config_differences(saved, saved) == []
    assert len(config_differences(saved, changed)) == 1
