"""Configuration of data: every mistake is reported with its dotted key."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from mpotrain.data.config import (
    DataConfig,
    ExistingTokenizerConfig,
    PrepareConfig,
    SentencePieceConfig,
    SourceConfig,
)


def good(**changes):
    values = {"sources": (SourceConfig(path="a"), SourceConfig(path="b")), "sequence_length": 8}
    return DataConfig(**{**values, **changes})


def test_good_sections_have_no_problems():
    assert good().problems("data") == []
    assert PrepareConfig(sources=("x.txt",), out="o").problems("prepare") == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sources": ()}, "data.sources:"),
        ({"sources": (SourceConfig(path=" "),)}, "data.sources[0].path:"),
        ({"sources": (SourceConfig(path="a", weight=0.0),)}, "data.sources[0].weight:"),
        ({"sources": (SourceConfig(path="a", weight=float("nan")),)}, "data.sources[0].weight:"),
        ({"sources": (SourceConfig(path="a"),) * 2}, "data.sources[1].path:"),
        ({"sequence_length": 0}, "data.sequence_length:"),
        ({"seed": -1}, "data.seed:"),
        ({"seed": 2**63}, "data.seed:"),
        ({"split": (0.5, 0.2, 0.2)}, "data.split:"),
        ({"split": (1.1, -0.1, 0.0)}, "data.split:"),
        ({"split": (0.0, 0.5, 0.5)}, "data.split:"),
    ],
)
def test_each_mistake_names_its_key(changes, key):
    found = good(**changes).problems("data")
    assert len(found) == 1
    assert found[0].startswith(key)


def test_all_mistakes_come_at_once():
    found = good(sequence_length=0, seed=-1, split=(0.0, 0.5, 0.4)).problems("data")
    assert [line.split(":")[0] for line in found] == [
        "data.sequence_length",
        "data.seed",
        "data.split",
        "data.split",
    ]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sources": ()}, "p.sources:"),
        ({"sources": ("a", "")}, "p.sources[1]:"),
        ({"out": ""}, "p.out:"),
        ({"documents_per_shard": 0}, "p.documents_per_shard:"),
        ({"max_bytes": 0}, "p.max_bytes:"),
        ({"num_workers": -1}, "p.num_workers:"),
        ({"tokenizer": SentencePieceConfig(vocab_size=200)}, "p.tokenizer.vocab_size:"),
        ({"tokenizer": SentencePieceConfig(character_coverage=2.0)}, "p.tokenizer.character"),
        ({"tokenizer": ExistingTokenizerConfig(path="")}, "p.tokenizer.path:"),
    ],
)
def test_prepare_mistakes_name_their_key(changes, key):
    config = PrepareConfig(**{"sources": ("a",), "out": "o", **changes})
    found = config.problems("p")
    assert len(found) == 1
    assert found[0].startswith(key)


def test_unknown_keys_and_loose_types_are_refused():
    adapter = TypeAdapter(DataConfig)
    text = '{"sources": [{"path": "a"}], "sequence_length": 8, "split": [0.9, 0.1, 0]}'
    assert adapter.validate_json(text).split == (0.9, 0.1, 0.0)
    with pytest.raises(ValidationError, match="seqlen"):
        adapter.validate_json('{"sources": [], "sequence_length": 8, "seqlen": 3}')
    with pytest.raises(ValidationError, match="sequence_length"):
        adapter.validate_json('{"sources": [], "sequence_length": "8"}')


def test_config_and_manifest_do_without_torch():
    code = (
        "import sys, mpotrain.data.config, mpotrain.data.manifest, mpotrain.data.prepare;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
