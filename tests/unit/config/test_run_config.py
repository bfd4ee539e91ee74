"""The run file: strictness, errors all at once, round trip, shipped files."""

import json
import tomllib
from pathlib import Path

import pytest

from mpotrain.config import (
    RunConfig,
    config_from_dict,
    config_schema,
    dump_config,
    flatten,
    load_config,
)
from mpotrain.errors import ConfigError
from mpotrain.schema import to_dict

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
RUNS = sorted((CONFIGS / "runs").glob("*.toml"))


def tiny(tmp_path: Path, *lines: str) -> Path:
    """Write a small valid run file with extra lines."""
    path = tmp_path / "run.toml"
    path.write_text(
        f'extends = ["{(CONFIGS / "base" / "gpt2-tiny.toml").as_posix()}"]\n'
        'name = "t"\nfolder = "runs/t"\n'
        '[data]\nsources = [{ path = "d" }]\nsequence_length = 32\n'
        "[train]\nsteps = 10\nglobal_batch_size = 4\nmicro_batch_size = 2\n"
        '[train.schedule]\nkind = "constant"\nlr = 1e-3\n' + "\n".join(lines) + "\n"
    )
    return path


def problems(tmp_path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny(tmp_path), overrides)
    return caught.value.problems


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    run = load_config(path)
    dumped = tmp_path / "resolved.toml"
    dumped.write_text(dump_config(run))
    assert load_config(dumped) == run
    assert config_from_dict(json.loads(json.dumps(to_dict(run))), "x") == run


def test_every_base_file_is_used_or_a_whole_model() -> None:
    for path in (CONFIGS / "base").glob("*.toml"):
        content = tomllib.loads(path.read_text())
        assert set(content) <= {"model", "data", "train", "engine", "checkpoint"}, path


def test_shipped_recipes_are_there() -> None:
    names = {path.stem for path in RUNS}
    assert names >= {
        "demo",
        "gpt2-small-dense",
        "gpt2-small-ttm16",
        "gpt2-small-ttm32",
        "gpt2-small-ttm64",
        "gpt2-small-ttm80",
        "gpt2-medium-ttm72",
    }


def test_all_errors_come_at_once_with_file_and_dotted_key(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "model.hiden_size=3",
        "train.steps=ten",
        "train.micro_batch_size=2.5",
        "model.sites.c_fc={kind='ttm', rank=4, ranks=5}",
        "data.sources=[{path='a', wieght=2.0}]",
    )
    assert len(found) == 5
    text = "\n".join(found)
    assert "command line: model.hiden_size: unknown key; did you mean 'hidden_size'?" in text
    assert "command line: train.steps: input should be a valid integer, got 'ten'" in text
    assert "train.micro_batch_size" in text
    assert "model.sites.c_fc.ranks: unknown key; did you mean 'rank'?" in text
    assert "data.sources.0.wieght: unknown key; did you mean 'weight'?" in text


def test_errors_name_the_file_that_set_the_value(tmp_path: Path) -> None:
    path = tiny(tmp_path, "warmup_stps = 3")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.problems == [
        f"{path}: train.schedule.warmup_stps: unknown key; did you mean 'warmup_steps'?"
    ]


@pytest.mark.parametrize("value", ["true", "1.5", '"3"'])
def test_integers_are_strict(tmp_path: Path, value: str) -> None:
    assert "train.steps" in problems(tmp_path, f"train.steps={value}")[0]


def test_content_errors_come_at_once_too(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "model.num_heads=5",
        "model.sites.c_fc={kind='mpo', in_modes=[8,4], out_modes=[16,16]}",
        "model.sites.c_proj={kind='mpo', in_modes=[16,16], out_modes=[8,8], bonds=[200]}",
        "data.sequence_length=65",
        "train.global_batch_size=5",
        "engine={kind='deepspeed', dtype='bf16', zero_stage=0}",
    )
    text = "\n".join(found)
    assert "command line: model.num_heads: 5 heads do not divide hidden_size 64" in text
    assert "model.sites.c_fc" in text
    assert "32" in text
    assert "model.sites.c_proj" in text
    assert "200" in text
    assert "128" in text
    assert "data.sequence_length: 65 is longer than model.context_length 64" in text
    assert "train.micro_batch_size" in text
    assert "engine.zero_stage" in text
    assert len(found) == 6


def test_missing_key_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "x"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert {line.split(": ")[1] for line in caught.value.problems} == {
        "folder",
        "model",
        "data",
        "train",
    }


def test_world_is_checked_against_the_batch(tmp_path: Path) -> None:
    run = load_config(tiny(tmp_path), ["engine={kind='deepspeed'}"])
    assert run.problems(2) == []
    assert any("train.global_batch_size" in line for line in run.problems(3))


def test_changing_the_kind_of_a_union_drops_the_old_fields(tmp_path: Path) -> None:
    path = tiny(tmp_path, '[model.sites.c_fc]\nkind = "ttm"\nrank = 4')
    assert load_config(path).model.sites.c_fc.kind == "ttm"
    assert load_config(path, ["model.sites.c_fc.kind=dense"]).model.sites.c_fc.kind == "dense"


def test_schema_describes_every_field(tmp_path: Path) -> None:
    schema = config_schema()
    for name, section in schema["$defs"].items():
        for key, field in section["properties"].items():
            described = field.get("description") or "$ref" in field or key == "kind"
            assert described, f"{name}.{key} has no text"
    assert schema["additionalProperties"] is False


def test_committed_schema_is_up_to_date(update_golden: bool) -> None:
    path = CONFIGS / "schema.json"
    text = json.dumps(config_schema(), indent=2) + "\n"
    if update_golden:
        path.write_text(text)
    assert path.read_text() == text, "run pytest --update-golden"


def test_flatten_lists_every_leaf(tmp_path: Path) -> None:
    run: RunConfig = load_config(tiny(tmp_path))
    leaves = flatten(run)
    assert leaves["train.schedule.lr"] == 1e-3
    assert leaves["data.sources"] == [{"path": "d", "weight": 1.0}]


def test_non_finite_numbers_are_refused(tmp_path: Path) -> None:
    assert "train.schedule.lr" in problems(tmp_path, "train.schedule.lr=nan")[0]
    assert "train.schedule.lr" in problems(tmp_path, "train.schedule.lr=inf")[0]
