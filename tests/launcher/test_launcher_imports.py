"""The launcher answers at once, wherever it is asked: it never imports torch."""

import os
import pkgutil
import subprocess
import sys
import time

import pytest
from launch_fakes import ROOT

import launcher
from launcher import cli

MODULES = sorted(
    module.name for module in pkgutil.iter_modules(launcher.__path__) if module.name != "__main__"
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run_python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_no_module_imports_torch() -> None:
    text = "import sys\n" + "".join(f"import launcher.{name}\n" for name in MODULES)
    text += "print([name for name in ('torch', 'deepspeed') if name in sys.modules])"
    assert run_python("-c", text) == "[]\n"


def test_help_is_quick() -> None:
    """The least of several: other work on the machine only ever adds to it.

    A slow machine takes long for Python alone.
    """

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        run_python(*arguments)
        return time.perf_counter() - start

    text = run_python("-m", "launcher", "--help")
    assert all(name in text for name in cli.COMMANDS)
    pairs = [(seconds("-m", "launcher", "--help"), seconds("-c", "")) for _ in range(3)]
    helped, bare = (min(times) for times in zip(*pairs, strict=True))
    assert helped < max(0.5, 15 * bare)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"launcher {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["slurm"], ["local", "r", "--bad"]])
def test_wrong_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["slurm"], "the following arguments are required: RUN, --cluster\n"),
        (["local"], "the following arguments are required: RUN\n"),
        (["slurm", "r", "--cluter", "c"], "--cluter: no such option; did you mean --cluster?"),
        (["status", "--wacth=5"], "--wacth: no such option; did you mean --watch?"),
        (["local", "r", "--train.steps=5"], "settings have no dashes: train.steps=VALUE"),
        (["local", "r", "--nothing-like-it"], "--nothing-like-it: no such option\n"),
        (["local", "r", "-x"], "-x: no such option"),
        (["local", "r", "--dry-run", "train.steps"], "'train.steps': is no setting; write key=val"),
        (["torchrun", "r", "--ranks", "2", "a=1", "--dry-run", "-y"], "torchrun: error: -y: no"),
    ],
)
def test_wrong_options_are_explained(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_mpotrain_does_not_know_the_launcher() -> None:
    for path in (ROOT / "mpotrain").rglob("*.py"):
        text = path.read_text()
        assert "import launcher" not in text
        assert "from launcher" not in text
