"""The file of a fine-tuning run: strict, all errors at once, shipped recipes."""

from pathlib import Path

import pytest
from unit.tune.tuning import write_tuning

from mpotrain.config_file import dump, json_schema
from mpotrain.errors import ConfigError
from mpotrain.tune.config import TuneConfig, load_tune_config
from mpotrain.tune.tasks import FORMATS, metrics_for

RECIPES = sorted((Path(__file__).resolve().parents[3] / "configs" / "tune").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    run = load_tune_config(path)
    dumped = tmp_path / "resolved.toml"
    dumped.write_text(dump(run))
    assert load_tune_config(dumped) == run
    assert run.problems(8 if run.engine.kind == "deepspeed" else 1) == []


def test_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"demo-mrpc", "mpobert-12-mnli"}


def problems(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_tune_config(write_tuning(tmp_path, tmp_path / "encoder"), overrides)
    return "\n".join(caught.value.problems)


def test_errors_of_form_come_at_once_and_name_their_key(tmp_path: Path) -> None:
    found = problems(
        tmp_path, "task.trian=x", "sourc=y", "dropout=high", "task.sequence_length=2.5"
    )
    assert "command line: task.trian: unknown key; did you mean 'train'?" in found
    assert "command line: sourc: unknown key; did you mean 'source'?" in found
    assert "command line: dropout: input should be a valid number, got 'high'" in found
    assert "task.sequence_length" in found
    assert found.count("\n") == 3


def test_errors_of_content_come_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "source=''",
        "dropout=1.0",
        "task.train=' '",
        "task.sequence_length=4",
        "task.max_bad_lines=-1",
        "task.mismatched=x.tsv",
        "train.steps=0",
        "parallel.expert=2",
    )
    for words in (
        "source: is empty",
        "dropout: must be in [0, 1), is 1.0",
        "task.train: is empty",
        "task.sequence_length: is 4 but must be at least 5",
        "task.max_bad_lines: must not be negative",
        "task.mismatched: only mnli has such a file",
        "train.steps: must be at least 1",
        "parallel.expert",
    ):
        assert words in found, words


def test_the_kind_of_a_task_is_one_of_glue_or_tsv(tmp_path: Path) -> None:
    assert "task" in problems(tmp_path, "task.kind=squad")
    path = write_tuning(tmp_path, tmp_path / "encoder")
    for kind in FORMATS:
        files = ["task.train=a", "task.validation=b"]
        run = load_tune_config(path, [f"task.kind={kind}", *files])
        assert run.task.format() is FORMATS[kind]


OWN = "task={kind='tsv', train='a', validation='b', text='t', label='l'%s}"


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    path = write_tuning(tmp_path, tmp_path / "encoder")
    form = load_tune_config(path, [OWN % ", pair='p', labels=['x', 'y', 'z']"]).task.format()
    assert form.wanted == ("t", "p", "l")
    assert (form.num_outputs, form.is_regression) == (3, False)
    assert form.metrics == ("accuracy", "matthews")
    form = load_tune_config(path, [OWN % ""]).task.format()
    assert (form.num_outputs, form.is_regression) == (1, True)
    assert form.metrics == metrics_for(0) == ("pearson", "spearman")
    assert metrics_for(2) == ("accuracy", "f1", "matthews")
    found = problems(tmp_path, OWN % ", pair='t', labels=['x', 'x']")
    assert "text, pair and label must be different columns" in found
    assert "task.labels: 'x' is named twice" in found
    assert "one class alone" in problems(tmp_path, OWN % ", labels=['x']")


def test_the_world_is_checked_against_the_batch(tmp_path: Path) -> None:
    path = write_tuning(tmp_path, tmp_path / "encoder")
    run = load_tune_config(path, ["engine={kind='deepspeed'}"])
    assert run.problems(2) == []
    assert any("train.global_batch_size" in line for line in run.problems(3))
    assert any("local" in line for line in load_tune_config(path).problems(2))


def test_schema_describes_every_field() -> None:
    schema = json_schema(TuneConfig)
    for name, section in {**schema["$defs"], "TuneConfig": schema}.items():
        for key, field in section["properties"].items():
            described = field.get("description") or "$ref" in field or key == "kind"
            assert described, f"{name}.{key} has no text"
