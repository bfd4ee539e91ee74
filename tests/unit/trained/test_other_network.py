"""Weights are not taken into a network that would compute something else with them."""

from pathlib import Path

import pytest
from encoder_runs import folder_of, prepare_stories, write_kind

from mpotrain.cli import main
from mpotrain.config import load_config
from mpotrain.report.weigh import weigh

OTHER = {
    "encoder": ["model.num_heads=2", "model.activation=relu", "model.norm_eps=0.1",
                "model.start.deepnorm=true"],
    "t5": ["model.relative_distance=100", "model.moe.router.gate=straight_through"],
}  # fmt: skip
FREE = {
    "encoder": ["model.dropout=0.0", "model.init_std=0.1", "model.start.auxiliary_scale=none",
                "model.activation_checkpointing=true", "model.sites.query.plan=chain"],
    "t5": ["model.dropout=0.3", "model.moe.router.balance_loss=0.5"],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind at step 2."""
    root = tmp_path_factory.mktemp("runs")
    data = prepare_stories(root / "data")
    written = {kind: write_kind(kind, root / kind, data) for kind in OTHER}
    for run in written.values():
        assert main(["train", str(run), "train.stop_after=2"]) == 0
    return written


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind, lines in OTHER.items() for change in lines]
)
def test_keys_that_decide_what_is_computed_may_not_change(
    runs: dict[str, Path], kind: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = change.partition("=")[0]
    for command in (["train", str(runs[kind])], ["eval", str(folder_of(runs[kind]))]):
        assert main([*command, change]) == 2
        text = capsys.readouterr().err
        assert "belongs to another network" in text
        assert f"{key}: " in text


@pytest.mark.parametrize("kind", list(FREE))
def test_keys_of_training_and_execution_may_change(runs: dict[str, Path], kind: str) -> None:
    more = [*FREE[kind], "train.stop_after=3"]
    assert main(["train", str(runs[kind]), *more]) == 0


def test_plan_misses_a_validation_split(runs: dict[str, Path]) -> None:
    run = load_config(runs["encoder"], ["data.split=[1.0, 0.0, 0.0]"])
    assert [p for p in weigh(run).problems if p.startswith("data.split: gives no documents")]
    assert weigh(load_config(runs["encoder"])).problems == []


def test_files_of_other_commands_are_named_as_such(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = Path(__file__).parents[3] / "configs" / "tune" / "demo-mrpc.toml"
    assert main(["plan", str(tune)]) == 2
    assert "see `mpotrain tune`" in capsys.readouterr().err
    assert main(["tune", str(runs["t5"]), "--method", "full"]) == 2
    assert "see `mpotrain train`" in capsys.readouterr().err
