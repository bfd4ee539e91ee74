"""Texts of `mpotrain plan` for every shipped run; `pytest --update-golden` rewrites them."""

from pathlib import Path

import pytest

from mpotrain.config import load_config
from mpotrain.report.text import render
from mpotrain.report.weigh import weigh

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / "configs" / "runs").glob("*.toml"))
GOLDEN = Path(__file__).parent / "plans"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_plan_text(
    path: Path, update_golden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no data are prepared
    run = load_config(path)
    world = 1 if run.engine.kind == "local" else 8 if path.stem.startswith("gpt2-small") else 4
    if run.parallel.data is not None:
        world = run.parallel.data * run.parallel.model_ranks
    text = render(weigh(run, world)) + "\n"
    golden = GOLDEN / f"{path.stem}.txt"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "run pytest --update-golden if this change is wanted"
