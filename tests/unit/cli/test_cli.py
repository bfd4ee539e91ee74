"""The command line: exit codes and messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpotrain.cli import main

RUNS = Path(__file__).resolve().parents[3] / "configs" / "runs"
TTM16 = str(RUNS / "gpt2-small-ttm16.toml")


def test_plan_prints_the_published_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TTM16]) == 0
    assert "68,085,504" in capsys.readouterr().out


def test_plan_json_and_overrides_before_and_after_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", TTM16, "--json", "--world", "2", "model.sites.c_fc.rank=32"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert main(["plan", TTM16, "model.sites.c_fc.rank=32", "--world", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == after
    assert after["num_parameters"] == 68_085_504 + 12 * (166_080 - 13_120)


def test_plan_exits_with_2_on_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TTM16, "--world", "3"]) == 2
    assert "nearest valid choices" in capsys.readouterr().out
    assert main(["plan", TTM16, "--world", "0"]) == 2
    assert main(["plan", TTM16, "--device", "abacus"]) == 2
    assert "known are" in capsys.readouterr().err


def test_errors_have_no_traceback_and_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", TTM16, "train.stepz=3", "model.num_heads=7"]) == 2
    err = capsys.readouterr().err
    assert "train.stepz: unknown key; did you mean 'steps'?" in err
    assert main(["train", "no/such/file.toml"]) == 2
    assert "no/such/file.toml: cannot be read" in capsys.readouterr().err


def test_a_rank_says_who_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "no.toml"]) == 2
    assert capsys.readouterr().err.startswith("rank 3: error: ")


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", TTM16, "--wrold", "2"])
    assert caught.value.code == 2
    assert "--wrold" in capsys.readouterr().err


def test_injected_local_rank_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=1", "plan", TTM16]) == 0
    assert main(["plan", "--local-rank=0", TTM16]) == 0


def test_config_show_diff_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", TTM16]) == 0
    assert 'name = "gpt2-small-ttm16"' in capsys.readouterr().out
    assert main(["config", "diff", TTM16, str(RUNS / "gpt2-small-dense.toml")]) == 0
    out = capsys.readouterr().out
    assert 'model.sites.c_fc.kind: "ttm" -> "dense"' in out
    assert "model.sites.c_fc.rank: 16 -> (absent)" in out
    assert "train.steps" not in out
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mpotrain.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'pydantic', 'numpy', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.rstrip().endswith("[]")
    assert "exit codes" in out.stdout


def test_missing_folders_are_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["eval"], ["generate"], ["inspect"]):
        assert main([*command, str(tmp_path / "nothing")]) == 2
        assert "holds no checkpoint" in capsys.readouterr().err
