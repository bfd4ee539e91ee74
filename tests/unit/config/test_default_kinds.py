"""Tables of tagged unions that name no kind mean the default one."""

from pathlib import Path

import pytest

from mpotrain.config import RunConfig, load_config
from mpotrain.data.objective_config import CausalConfig
from mpotrain.engine.config import LocalConfig
from mpotrain.errors import ConfigError
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.train.config import AdamWConfig, LambConfig

PLAIN = """
name = "t"
folder = "runs/t"
[model]
vocab_size = 64
context_length = 32
hidden_size = 16
num_layers = 1
num_heads = 2
ffn_size = 32
[data]
sources = [{ path = "d" }]
sequence_length = 32
[train]
steps = 10
global_batch_size = 4
micro_batch_size = 2
[train.schedule]
kind = "constant"
lr = 1e-3
"""


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(PLAIN)
    return load_config(path, overrides)


def test_a_model_without_a_kind_is_a_gpt2(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path).model, GPT2Config)


def test_single_keys_of_a_default_section_are_enough(tmp_path: Path) -> None:
    run = load(
        tmp_path, "train.optimizer.weight_decay=0.25", "engine.device=cpu",
        "data.objective.document_mask=true",
    )  # fmt: skip
    assert run.train.optimizer == AdamWConfig(weight_decay=0.25)
    assert run.engine == LocalConfig(device="cpu")
    assert run.data.objective == CausalConfig(document_mask=True)


def test_another_kind_is_what_it_says(tmp_path: Path) -> None:
    lamb = load(tmp_path, "train.optimizer={kind='lamb', max_trust=0.5}").train.optimizer
    assert lamb == LambConfig(max_trust=0.5)


def test_keys_of_another_kind_are_unknown_to_the_default(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer\.max_trust: unknown key"):
        load(tmp_path, "train.optimizer.max_trust=0.5")


def test_a_union_without_a_default_still_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.schedule"):
        load(tmp_path, "train.schedule={lr=1e-3}")
